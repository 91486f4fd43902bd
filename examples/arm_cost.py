"""What routing costs: ARM's seconds and bytes a task, and the features' share of a prefill and of a training step.

    python examples/arm_cost.py --tasks-dir <all tasks> --json arm_cost.json

One thread, SmolLM2, LoRA r = 4 on q and v of the top layers. Seconds of ARM are those of one task, blocks untrained,
at the end of a pool of so many tasks: what happens before the first step (features of the prompts, the first fit) and
after the last (the fit that gives old tasks their attention back, the generator, the commit). Ratios are medians over
rounds in one process, with quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from benching import alternate, quartiles, table
from peft import LoraConfig, get_peft_model
from settings import QUICK_ROWS  # noqa: F401  # sets the environment of the examples

from peft_sapt import ArmCallback, GeneratorSettings, SaptConfig
from peft_sapt.continual.base import load_base
from peft_sapt.continual.prompts import PromptStyle, left_padded
from peft_sapt.continual.provenance import environment
from peft_sapt.continual.streams import load_folder
from peft_sapt.routing.hidden import layers_of

KINDS = ("statistics", "rows", "generated", "ridge")  # replay of the learned attention; the closed form
TARGETS = ["q_proj", "v_proj"]
Prompts = dict[str, list[list[int]]]


def batches(rows: list[list[int]], pad: int) -> list[dict[str, torch.Tensor]]:
    return [left_padded(rows[i : i + 32], pad) for i in range(0, len(rows), 32)]


def arm_for(tokenizer: Any, kind: str) -> ArmCallback:
    settings = GeneratorSettings(epochs=2.0, batch_size=8, learning_rate=5e-3, draw_batch_size=32)
    return ArmCallback(tokenizer, replay="statistics" if kind == "ridge" else kind, generator=settings)


def pool_on(base: Any, first: str, layers: list[int] | None, **fields: Any) -> Any:
    config = SaptConfig(
        task_type="CAUSAL_LM",
        task_name=first,
        r=4,
        target_modules=TARGETS,
        layers_to_transform=layers,
        init_weights=False,
        **fields,
    )
    return get_peft_model(copy.deepcopy(base), config)


def learn(model: Any, arm: ArmCallback, name: str, rows: list[list[int]], pad: int) -> tuple[float, float]:
    """Seconds before and after the training of one more task."""
    if name not in model.tasks:
        model.add_task(name)
    begun = time.perf_counter()
    arm.prepare(model, batches(rows, pad))
    between = time.perf_counter()
    arm.reflect(model)
    return between - begun, time.perf_counter() - between


def arm_seconds(
    base: Any, tokenizer: Any, prompts: Prompts, counts: list[int], top: list[int]
) -> list[dict[str, Any]]:
    """Of every kind of replay, seconds of the first task and of the last of pools of ``counts`` tasks."""
    names, pad, found = list(prompts), tokenizer.pad_token_id, []
    for router, kinds in (("attention", KINDS[:3]), ("ridge", KINDS[3:])):
        model = pool_on(base, names[0], top, router=router)
        arm = arm_for(tokenizer, kinds[0])
        before, after = learn(model, arm, names[0], prompts[names[0]], pad)
        found.append({"kind": kinds[0], "tasks": 1, "before": before, "after": after})
        for at, name in enumerate(names[1 : max(counts)], start=2):
            for kind in kinds if at in counts else ():
                copied = copy.deepcopy(model)
                before, after = learn(copied, arm_for(tokenizer, kind), name, prompts[name], pad)
                found.append({"kind": kind, "tasks": at, "before": before, "after": after})
                print(f"T = {at}, {kind}: {before:.1f} s before, {after:.1f} s after", flush=True)
            learn(model, arm, name, prompts[name], pad)
    return found


def stored_bytes(base: Any, tokenizer: Any, prompts: Prompts, top: list[int]) -> dict[str, dict[str, int]]:
    """Bytes that a second and a third task add to a pool's file, by the part that they belong to; ``pool``: once."""
    found: dict[str, dict[str, int]] = {}
    names, pad = list(prompts), tokenizer.pad_token_id
    for kind in ("statistics", "rows", "ridge"):
        model = pool_on(base, names[0], top, router="ridge" if kind == "ridge" else "attention")
        arm, sizes = arm_for(tokenizer, kind), []
        for name in names[:3]:
            learn(model, arm, name, prompts[name], pad)
            sizes.append(part_bytes(model))
        found[kind] = {part: sizes[2][part] - sizes[1][part] for part in sizes[2]}
        found[f"{kind}, pool"] = {part: 2 * sizes[1][part] - sizes[2][part] for part in sizes[2]}
    return found


def part_bytes(model: Any) -> dict[str, int]:
    """Bytes in a saved pool: blocks, everyday prompts, and all else (keys, projection, targets, statistics)."""
    from peft import get_peft_model_state_dict

    sizes = {"blocks": 0, "everyday prompts": 0, "routing": 0}
    for name, value in get_peft_model_state_dict(model).items():
        part = "blocks" if "sapt_A" in name or "sapt_B" in name else "routing"
        sizes["everyday prompts" if "background" in name else part] += value.nbytes
    return sizes


def shares(
    base: Any, tokenizer: Any, prompts: Prompts, top: list[int], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds, round by round, of a prefill and of a training step: plain LoRA, and a pool of five tasks by features
    and by the layers that have blocks."""
    names, pad = list(prompts), tokenizer.pad_token_id
    rows = [row[-96:] for row in prompts[names[0]][:8]]
    batch = left_padded(rows, pad)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[:, :-6] = -100
    found: dict[str, dict[str, list[float]]] = {}
    for where, layers in (("all layers", None), ("top layers", top)):
        common = {"r": 4, "target_modules": TARGETS, "layers_to_transform": layers, "task_type": "CAUSAL_LM"}
        models = {"plain LoRA": get_peft_model(copy.deepcopy(base), LoraConfig(init_lora_weights=False, **common))}
        for features in ("max", "both", "hidden"):
            model = pool_on(base, "t0", layers, tasks=[f"t{i}" for i in range(5)], features=features, fallback=None)
            models[f"pool, {features}"] = model

        def forward(model: Any) -> None:
            with torch.no_grad():
                model(**batch)

        def step(model: Any) -> None:
            model(**batch, labels=labels).loss.backward()
            model.zero_grad(set_to_none=True)

        def first_step(model: Any = models["pool, hidden"]) -> None:
            model.base_model.pool.hooks.reader.known.clear()
            step(model)

        runs = {name: (lambda m=m: forward(m)) for name, m in models.items()}
        for model in models.values():
            model.eval()
        found[f"prefill, {where}"] = alternate(runs, rounds)
        for model in models.values():
            model.train()
        runs = {name: (lambda m=m: step(m)) for name, m in models.items()}
        runs["pool, hidden, prompts seen for the first time"] = first_step
        found[f"training step, {where}"] = alternate(runs, rounds)
    return found


def elsewhere(base: Any, config: Any, prompts: Prompts) -> dict[str, float]:
    """What a server that is not transformers needs for the features: bytes of the layers that are read, of the token
    embeddings beside them, and the share of all layers."""
    layers = layers_of(base)
    size = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    table_bytes = base.get_input_embeddings().weight.nbytes
    return {
        "layers": config.features_layer,
        "of": len(layers),
        "bytes_of_layers": sum(size[: config.features_layer]),
        "bytes_of_embeddings": table_bytes,
        "bytes_of_all": sum(p.nbytes for p in base.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96, help="training prompts a task")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a prompt")
    parser.add_argument("--layers", type=int, default=8, help="topmost layers that have blocks")
    parser.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[5, 14])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, tokenizer = load_base(args.model, args.models)
    style = PromptStyle(head="{definition}\n", tail="\nOutput:", definitions=True, max_tokens=args.max_tokens)
    stream = load_folder(args.tasks_dir)
    prompts = {n: [style.ids(tokenizer, row) for row in s["train"][: args.rows]] for n, s in stream.items()}
    top = list(range(len(layers_of(base)) - args.layers, len(layers_of(base))))
    pool = pool_on(base, "t0", top)
    found: dict[str, Any] = {"settings": {**vars(args), "json": None, "tasks_dir": None, "models": None}}
    found["elsewhere"] = elsewhere(base, pool.base_model.pool.config, prompts)
    found["shares"] = shares(base, tokenizer, prompts, top, args.rounds)
    for what, times in found["shares"].items():
        ratios = [[n, *(f"{q:.3f}" for q in quartiles(times[n], times["plain LoRA"]))] for n in times]
        print(f"{what}, by plain LoRA's\n" + table(["", "quarter", "median", "three quarters"], ratios), flush=True)
    found["bytes"] = stored_bytes(base, tokenizer, prompts, top)
    print(json.dumps(found["bytes"], indent=1), flush=True)
    found["arm"] = arm_seconds(base, tokenizer, prompts, args.counts, top)
    found["environment"] = environment()
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
