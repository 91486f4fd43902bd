r"""How well each router finds a prompt's own task, by itself: no block is trained and no answer is written.

    python examples/routing_alone.py --tasks-dir <all tasks> --tasks mnli,cb,... --no-definitions --out results/routing

For every kind of features, router, replay, number of training prompts, order and seed that is asked for, it shows the
tasks' training prompts to a pool one task after another, as ArmCallback does, and then counts the test prompts whose
own block leads. One JSON file per combination; those that are there are skipped. Features are computed once and kept
in --cache.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from settings import QUICK_ROWS  # noqa: F401  # sets the environment of the examples

from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.continual.base import load_base
from peft_sapt.continual.prompts import PromptStyle, left_padded
from peft_sapt.continual.provenance import environment
from peft_sapt.continual.streams import fingerprint, load_folder
from peft_sapt.pool import lifecycle

KINDS = {  # what is compared: router, and replay of the learned one
    "attention-statistics": ("attention", "statistics"),
    "attention-rows": ("attention", "rows"),
    "ridge": ("ridge", "statistics"),
}
BATCH = 32


def pool_on(base: Any, features: str, router: str, first: str) -> Any:
    """A pool with one small block, which is never used."""
    config = SaptConfig(
        task_type="CAUSAL_LM", task_name=first, r=1, layers_to_transform=[0], features=features, router=router
    )
    return get_peft_model(base, config)


def features_of(model: Any, tokenizer: Any, style: PromptStyle, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Features [N, d] of all ``rows``, computed for rows of like length together."""
    prompts = [style.ids(tokenizer, row) for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts = [
        model.pooled_prompts([left_padded([prompts[i] for i in order[k : k + BATCH]], tokenizer.pad_token_id)])
        for k in range(0, len(order), BATCH)
    ]
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


class Prompts:
    """Features of the tasks' prompts, computed once and kept in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.base, self.tokenizer = load_base(args.model, args.models)
        self.reading = copy.deepcopy(self.base)  # beside the base that holds the pool under way
        self.stream = load_folder(args.tasks_dir, args.tasks)
        self.style = PromptStyle(
            head=args.head, tail=args.tail, definitions=args.definitions, max_tokens=args.max_tokens
        )
        self.known: dict[str, torch.Tensor] = {}

    def of(self, features: str, name: str, split: str, count: int) -> torch.Tensor:
        """Features [N, d] of the first ``count`` prompts of a task."""
        rows = self.stream[name][split][: max(self.args.rows) if split == "train" else self.args.test_rows]
        asked = json.dumps([self.args.model, features, vars(self.style), rows], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()[:24]
        path = self.args.cache / f"{key}.pt"
        if key not in self.known:
            if not path.exists():
                model = pool_on(self.reading, features, "attention", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(features_of(model, self.tokenizer, self.style, rows), path)
                model.unload()
                print(f"features {features} {name} {split}: {len(rows)}", flush=True)
            self.known[key] = torch.load(path)
        return self.known[key][:count]


def run_one(
    prompts: Prompts, features: str, kind: str, rows: int, tasks: list[str], seed: int, background: dict[str, Any]
) -> dict[str, Any]:
    """Percent of each task's test prompts that its own block leads, and seconds a task."""
    router, replay = KINDS[kind]
    torch.manual_seed(seed)
    model = pool_on(prompts.base, features, router, tasks[0])
    arm = ArmCallback(prompts.tokenizer, replay=replay, max_rows=max(prompts.args.rows))
    if features in background:
        known, forms = background[features]
        model.base_model.pool.memory.show_own_config("default").background_forms = forms
        lifecycle.set_background(model.base_model.pool, known)
    seconds = []
    for name in tasks:
        if name not in model.tasks:
            model.add_task(name)
        begun = time.perf_counter()
        arm.prepare(model, [prompts.of(features, name, "train", rows)], seed=seed)
        arm.reflect(model, seed=seed)
        seconds.append(round(time.perf_counter() - begun, 2))
    pool = model.base_model.pool
    background[features] = pool.statistics.background("default"), pool.config.background_forms
    led, own, away = [], [], []
    for i, name in enumerate(tasks):
        test = prompts.of(features, name, "test", prompts.args.test_rows)
        weights = pool.router.log_weights("default", test).exp()
        led.append(100.0 * float((weights.argmax(dim=1) == i).float().mean()))
        own.append(float(weights[:, i].mean()))
        away.append(100.0 * float((pool.router.attend("default", test).sum(dim=1) == 0).float().mean()))
    model.unload()
    return {"led": led, "own_weight": own, "left_to_base": away, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks-dir", type=Path, required=True)
    parser.add_argument("--tasks", type=lambda text: text.split(","), help="in this order; alphabetical by default")
    parser.add_argument("--name", required=True, help="of the comparison, which the files begin with")
    parser.add_argument("--definitions", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--head", default="{definition}\n")
    parser.add_argument("--tail", default="\nOutput:")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--features", type=lambda text: text.split(","), default=["hidden"])
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[96])
    parser.add_argument("--test-rows", type=int, default=600, help="test prompts a task")
    parser.add_argument("--orders", type=lambda text: text.split(","), default=["listed"])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument("--cache", type=Path, default=Path("routing-features"))
    parser.add_argument("--out", type=Path, default=Path("examples/results/routing"))
    args = parser.parse_args()
    prompts, background = Prompts(args), {}
    args.out.mkdir(parents=True, exist_ok=True)
    data = fingerprint(prompts.stream)
    grid = itertools.product(args.features, args.kinds, args.rows, args.orders, args.seeds)
    for features, kind, rows, order, seed in grid:
        path = args.out / f"{args.name}.{features}.{kind}.{rows}.{order}.{seed}.json"
        if path.exists():
            continue
        tasks = list(prompts.stream) if order == "listed" else list(prompts.stream)[::-1]
        found = run_one(prompts, features, kind, rows, tasks, seed, background)
        mean, worst = sum(found["led"]) / len(tasks), min(found["led"])
        print(f"{path.stem}: mean {mean:.1f}, worst {worst:.1f}, {sum(found['seconds']):.0f} s", flush=True)
        settings = {"features": features, "kind": kind, "rows": rows, "order": order, "seed": seed}
        settings |= {"definitions": args.definitions, "max_tokens": args.max_tokens, "test_rows": args.test_rows}
        about = {"data": data, "environment": environment(), "model": args.model}
        path.write_text(json.dumps({"tasks": tasks, **settings, **found, **about}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
