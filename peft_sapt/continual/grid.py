"""A grid of runs, method by order by seed, each written once and never run again: it resumes wherever it was stopped.

One run is one JSON file, ``<folder>/<benchmark>/<method>.<order>.<seed>.json``, written atomically when the run ends.
Several processes may work on one folder: a run under way is held by a lock that dies with its process.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..arm.progress import say
from ..errors import StreamError
from ..storage.atomic import write_atomically
from ..storage.fingerprint import fingerprint as numbers_of
from ..storage.fingerprint import short_print
from .labels import alone_of
from .learner import Bench
from .method import Method, learn_stream
from .methods import METHODS
from .metrics import average_performance, backward_transfer, forgetting_rate
from .provenance import environment
from .streams import fingerprint

RUN_KEYS = ("method", "order", "seed")  # what tells the runs of one benchmark apart


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    benchmark: str
    method: str
    order: str = "listed"
    seed: int = 0

    def path(self, folder: Path) -> Path:
        return folder / self.benchmark / f"{self.method}.{self.order}.{self.seed}.json"


Orders = Mapping[str, list[str]]  # names of tasks, oldest first, by name of the order


def orders_of(names: list[str]) -> dict[str, list[str]]:
    """The orders that every stream has."""
    return {"listed": list(names), "reversed": names[::-1]}


def runs_of(
    benchmark: str,
    methods: Iterable[str],
    orders: Iterable[str],
    seeds: Iterable[int],
    known: Iterable[str] = ("listed", "reversed"),
) -> list[Run]:
    """The cells of a grid; raises [`StreamError`] for a method, or an order that is not ``known``."""
    for what, given, there in (("method", methods, METHODS), ("order", orders, known)):
        wrong = [name for name in given if name not in there]
        if wrong:
            raise StreamError(f"There is no {what} {wrong}: choose among {list(there)}.")
    return [Run(benchmark, m, o, s) for s in seeds for o in orders for m in methods]


def with_single_scores(runs: list[Run], orders: Orders) -> list[Run]:
    """``runs``, with those that measure what FWT compares with: each method's tasks alone, for each seed.

    Scores of tasks alone do not depend on their order, so that one order with all tasks is enough.
    """
    found: list[Run] = []
    for run in runs:
        own = replace(run, method=alone_of(run.method))
        covered = any(
            (r.method, r.seed) == (own.method, own.seed) and set(orders[r.order]) >= set(orders[own.order])
            for r in found
        )
        found += [each for each in ([] if covered else [own]) + [run] if each not in found]
    return found


def run_grid(
    bench: Bench, runs: list[Run], folder: Path, provenance: dict[str, Any], orders: Orders | None = None
) -> None:
    """Do what is missing of ``runs`` under ``folder``.

    Raises:
        StreamError: a file is there already that was made with other settings or data.
    """
    orders = orders or orders_of(list(bench.stream))
    for number, run in enumerate(runs, start=1):
        path = run.path(folder)
        say(f"run {number} of {len(runs)}: {run.method}, order {run.order}, seed {run.seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path) as mine:
            own = bench_for(bench, run, orders)
            if not mine or is_done(path, own, run):
                continue
            write_atomically(path, text_of(run_one(own, run, provenance)[0]))
            gc.collect()  # the model, whose hooks and modules refer to each other, before the next one is built
            say(f"written: {path}")


def run_one(own: Bench, run: Run, provenance: dict[str, Any]) -> tuple[dict[str, Any], Method]:
    """The result of one run on a bench of its order and seed, and the method that has learned it."""
    begun = time.perf_counter()
    method = METHODS[run.method](own)
    found = learn_stream(method)
    matrix = found["matrix"]
    summary = {
        "AP": average_performance(matrix),
        "F.Ra": forgetting_rate(matrix),
        "BWT": backward_transfer(matrix),
    }
    seconds = {**own.seconds, "total": time.perf_counter() - begun}
    result = {
        **asdict(run),
        "tasks": list(own.stream),
        "settings": settings_of(own),
        "summary": summary,
        **found,
        "provenance": {**environment(), **provenance, "seconds": {k: round(v, 1) for k, v in seconds.items()}},
    }
    return result, method


def bench_for(bench: Bench, run: Run, orders: Orders) -> Bench:
    """``bench`` with the order and the seed of ``run``; the base model stays shared."""
    own = replace(
        bench,
        stream={name: bench.stream[name] for name in orders[run.order]},
        budget=replace(bench.budget, seed=run.seed),
        seconds={},
    )
    own.remembering = bench.remembering
    return own


def settings_of(bench: Bench) -> dict[str, Any]:
    """Everything that a result depends on beside method, order and seed."""
    budget = {k: v for k, v in asdict(bench.budget).items() if k != "seed"}
    rows = {
        name: [len(splits[s]) for s in ("train", "validation", bench.split)] for name, splits in bench.stream.items()
    }
    dtype = str(next(bench.base.parameters()).dtype).removeprefix("torch.")
    return {
        "budget": budget,
        "dtype": dtype,
        "style": asdict(bench.style),
        "metric": bench.score.__name__,
        "model": base_fingerprint(bench.base),
        "numbers": short_print(numbers_of(bench.base)),
        "split": bench.split,
        "test_rows": bench.test_rows,
        "rows": dict(sorted(rows.items())),
        "data": fingerprint(bench.stream),
    }


def base_fingerprint(base: torch.nn.Module) -> str:
    """Type and size of a base model, and SHA-256 of its token embeddings."""
    table = base.get_input_embeddings().weight.detach().float().cpu().contiguous()  # type: ignore[operator]  # a transformers model has embeddings
    sha = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    count = sum(parameter.numel() for parameter in base.parameters())
    return f"{base.config.model_type} {count} {sha}"  # type: ignore[union-attr]  # a transformers model has a config


def is_done(path: Path, own: Bench, run: Run) -> bool:
    """Whether ``path`` holds the result of ``run`` on ``own``; raises [`StreamError`] for another run or data."""
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    known = {**found["settings"], **{key: found.get(key) for key in RUN_KEYS}}
    wanted = {**settings_of(own), **{key: getattr(run, key) for key in RUN_KEYS}}
    differing = differences(known, wanted)
    if differing:
        raise StreamError(
            f"{path} was made with other settings ({', '.join(differing)}): give another folder or benchmark name, or "
            "delete the file to run it again."
        )
    return True


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which a stored result and a run differ, sorted."""
    older = {"dtype": "float32", "numbers": wanted["numbers"]}  # what results say nothing of that have neither
    stored = {**older, **known}
    return sorted(key for key in wanted if stored.get(key) != wanted[key])


def text_of(result: dict[str, Any]) -> bytes:
    """JSON with NaN as null, so that other readers than Python's take it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and value != value else value

    return (json.dumps(plain(result), indent=1) + "\n").encode()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether this process may work on ``path`` now; another one that does holds a lock until it ends or dies."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()  # the file stays: whoever waits on one that was removed would hold another lock than the next
