"""Structure-aware fuzzing: valid documents with values, keys and bytes replaced, and what a parser made of them.

A parser may give a value or raise one of this package's errors; anything else is a crash. Cases follow from the seed.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import numpy as np
import torch

from helpers.paths import ROOT
from peft_sapt import SaptConfig
from peft_sapt.arm.stored import read_drawing
from peft_sapt.continual.results import load_runs
from peft_sapt.continual.streams import load_folder
from peft_sapt.errors import SaptError
from peft_sapt.official.folders import read_attention
from peft_sapt.pool.config_file import pool_values, reconciled
from peft_sapt.pool.state_dict import described
from peft_sapt.storage.checkpoints import fault_of
from peft_sapt.storage.fingerprint import checked as checked_fingerprint
from peft_sapt.storage.lora_folder import read_lora
from peft_sapt.storage.manifest import build_manifest, check_loaded, read_manifest
from peft_sapt.storage.plain_file import opened
from peft_sapt.storage.prompt_folder import read_prompt

COVERED = 2_000  # cases under the coverage tool, which slows them down
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "../../x", "a\x00b", "9" * 50, "\ud800", "x" * 300, [], [[]], [None], ["a", "a"], [1, "x"], {}, {"": {}},
    {"a": [1]}, "default", "SAPT", "LORA", [0], [-1], [10**9], "1e5", [float("nan")],
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:20]):
            found += places(inner, (*path, i))
    return found


def mutated(document: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three changes: a value replaced, a key dropped, renamed, added or doubled."""
    value = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = places(value)
        if not every:
            return rng.choice(ODD)
        *way, last = rng.choice(every)
        holder = value
        for step in way:
            holder = holder[step]
        kind = rng.random()
        if kind < 0.6:
            holder[last] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del holder[last]
        elif isinstance(holder, dict):
            holder[rng.choice(("zzz", "", "tasks", "peft_type", "0", "\u202e"))] = copy.deepcopy(rng.choice(ODD))
        else:
            holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(rng.choice([*ODD, holder[last]])))
    return value


def as_bytes(document: Any, rng: random.Random) -> bytes:
    """A mutated document as text; now and then its bytes are spoiled too, cut, or nested without end."""
    if rng.random() < 0.02:
        return rng.choice((b"[" * 50_000, b'{"a":' * 50_000, b"", b"\xff\xfe\x00", b"null", b"3", b'"x"'))
    data = bytearray(
        json.dumps(mutated(document, rng), ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
    )
    if rng.random() < 0.15 and data:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)]
    return bytes(data)


SNIPPETS = (b"cos\nsystem\n", b"(S'x'\ntR.", b"cnumpy\nload\n", b"\x80\x04", b"0", b"R", b"b")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is some: a disk would be waited for in each of a million cases."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


@dataclass
class Parser:
    """A parser under test: ``case(rng)`` gives it an input; ``functions`` by file are what it is made of."""

    name: str
    case: Callable[[random.Random], Any]
    functions: dict[str, str]


def parsers(folder: Path) -> list[Parser]:
    """Every parser of files that this package has, on valid documents to begin with."""
    config = SaptConfig(tasks=["a", "b"], token_dim=8, replay_rows=[2, 0], task_type="CAUSAL_LM", target_modules=["q"])
    tensors = {"x.shared_attention.sapt_key.weight": torch.zeros(1, 8), "x.sapt_A.weight": torch.ones(4, 8)}
    print_of = {"embed": {"shape": [4, 8], "values": [0.5] * 32}}
    manifest = read_manifest(
        build_manifest(
            {**described(config), "committed": [True, False]},
            pool_values(config),
            tensors,
            print_of,
            [[0.5, 0.5], None],
        )
    )
    values = json.loads(json.dumps({**config.to_dict(), "target_modules": ["q"], "peft_type": "SAPT"}, default=list))

    def manifests(rng: random.Random) -> None:
        data = as_bytes(manifest, rng)
        found = read_manifest(torch.frombuffer(bytearray(data) or bytearray(b" "), dtype=torch.uint8))
        checked_fingerprint(found.get("base", {}))
        check_loaded(found, described(config), tensors)

    def configs(rng: random.Random) -> None:
        (folder / "adapter_config.json").write_bytes(as_bytes(values, rng))
        found = SaptConfig.from_pretrained(str(folder))
        if rng.random() < 0.5:
            reconciled(found, mutated({**manifest, "save_id": "other"}, rng), folder)

    row = {"task": "t", "instruction": "do", "input": "x", "output": ["y"]}
    rows = folder / "rows"
    rows.mkdir()
    for split in ("validation", "test"):
        (rows / f"t.{split}.jsonl").write_text(json.dumps(row) + "\n")

    def streams(rng: random.Random) -> None:
        lines = b"\n".join(as_bytes(row, rng) for _ in range(rng.randint(0, 3)))
        (rows / "t.train.jsonl").write_bytes(lines)
        load_folder(rows)

    marked = folder / "marked"
    marked.mkdir()
    (marked / "a.pt").write_bytes(b"1234")

    def markers(rng: random.Random) -> None:
        (marked / "sapt_complete.json").write_bytes(as_bytes({"a.pt": 4}, rng))
        fault_of(marked)

    drawing = {"start": [1, 2], "end": 3, "closing": [], "longest": 8, "known": ["ab"]}

    def drawings(rng: random.Random) -> None:
        (folder / "generator.json").write_bytes(as_bytes(drawing, rng))
        read_drawing(folder)

    runs = folder / "runs"
    runs.mkdir()
    run = {"method": "sapt", "order": "listed", "seed": 0, "tasks": ["a", "b"], "matrix": [[1.0, None], [2.0, 3.0]]}

    def results(rng: random.Random) -> None:
        (runs / "sapt.listed.0.json").write_bytes(as_bytes(run, rng))
        load_runs(runs)

    plain = {
        "peft_type": "LORA",
        "lora_alpha": 8,
        "r": 2,
        "use_rslora": False,
        "bias": "none",
        "init_lora_weights": True,
    }
    lora, soft = folder / "lora", folder / "soft"
    for path in (lora, soft):
        path.mkdir()
    head = {
        "base_model.model.q.lora_A.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "base_model.model.q.lora_B.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [32, 64]},
    }

    def safetensors(header: bytes, rng: random.Random) -> bytes:
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**30, 2**63, len(header) - 1))
        return struct.pack("<Q", max(size, 0)) + header + bytes(64 if rng.random() < 0.9 else rng.randrange(80))

    def loras(rng: random.Random) -> None:
        whole = rng.random() < 0.5
        (lora / "adapter_config.json").write_bytes(json.dumps(plain).encode() if whole else as_bytes(plain, rng))
        header = as_bytes(head, rng) if whole else json.dumps(head).encode()
        (lora / "adapter_model.safetensors").write_bytes(safetensors(header, rng))
        read_lora(lora)

    tuned = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    vector = {"prompt_embeddings": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}

    def prompts(rng: random.Random) -> None:
        (soft / "adapter_config.json").write_bytes(
            as_bytes(tuned, rng) if rng.random() < 0.5 else json.dumps(tuned).encode()
        )
        (soft / "adapter_model.safetensors").write_bytes(safetensors(as_bytes(vector, rng), rng))
        read_prompt(soft, 4, 4)

    def headers(rng: random.Random) -> None:
        path = folder / "weights"
        path.write_bytes(safetensors(as_bytes(head, rng), rng))
        with opened(path if rng.random() < 0.98 else folder / "no such file"):
            pass

    seeds = [pickle.dumps(np.array([0.25, 0.75]), protocol=p) for p in range(5)]

    def pickles(rng: random.Random) -> None:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(data) + 1)
            if rng.random() < 0.5 and place < len(data):
                data[place] = rng.randrange(256)
            else:
                data[place:place] = rng.choice(SNIPPETS)
        (folder / "attention.pkl").write_bytes(data)
        read_attention(folder / "attention.pkl")

    return [
        Parser("manifest", manifests, {"storage/manifest.py": "read_manifest check_loaded",
                                       "storage/plain_file.py": "parse_manifest differences",
                                       "storage/fingerprint.py": "checked"}),
        Parser("config", configs, {"config.py": "__post_init__ check_ranges _check_tasks _check_auto_mapping",
                                   "pool/config_file.py": "read_values load_config reconciled",
                                   "validation.py": "check_task_name is_number is_positive is_int checked_record "
                                   "checked_records"}),
        Parser("weights header", headers, {"storage/plain_file.py": "opened refusing"}),
        Parser("JSONL stream", streams, {"continual/streams.py": "load_folder files_of _read bounded checked"}),
        Parser("checkpoint marker", markers, {"storage/checkpoints.py": "fault_of"}),
        Parser("generator", drawings, {"arm/stored.py": "read_drawing _lists"}),
        Parser("results", results, {"continual/results.py": "load_runs with_nan"}),
        Parser("LoRA folder", loras, {"storage/lora_folder.py": "read_lora _read_config"}),
        Parser("soft prompt", prompts, {"storage/prompt_folder.py": "read_prompt"}),
        Parser("official pickle", pickles, {"official/arrays.py": "__init__ __setstate__ vector from_buffer encode "
                                            "find_class check_steps unpickled"}),
    ]  # fmt: skip


def fuzz(parser: Parser, cases: int, seed: int = 0) -> tuple[Counter, list[str]]:
    """Outcomes of ``cases`` inputs by name, and the first crashes."""
    rng, outcomes, crashes = random.Random(seed), Counter(), []
    for number in range(cases):
        try:
            parser.case(rng)
            outcomes["read"] += 1
        except SaptError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            if isinstance(error, TypeError) and "missing required keys" in str(error):
                outcomes["PEFT: no peft_type"] += 1  # as it says of a file of any method
                continue
            outcomes["CRASH"] += 1
            crashes.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}")
    return outcomes, crashes[:5]


def covered(parser: Parser) -> float:
    """Percent of the statements of the parser's functions that ``COVERED`` cases run."""
    watch = coverage.Coverage(data_file=None, include=[str(ROOT / "peft_sapt" / name) for name in parser.functions])
    watch.start()
    fuzz(parser, COVERED, seed=1)
    watch.stop()
    ran = every = 0
    for name, functions in parser.functions.items():
        path = ROOT / "peft_sapt" / name
        _, statements, _, absent, _ = watch.analysis2(str(path))
        inside = lines_of(path, functions.split()) & set(statements)
        every += len(inside)
        ran += len(inside - set(absent))
    return 100.0 * ran / every


def lines_of(path: Path, functions: list[str]) -> set[int]:
    """Lines of the bodies of these functions and methods, each of which must be there."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert set(functions) <= {node.name for node in nodes}, f"{path.name} has not all of {functions}"
    picked = [node for node in nodes if node.name in functions]
    return {line for node in picked for line in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}
