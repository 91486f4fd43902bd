"""Time and memory of a training step with a pool, against plain PEFT LoRA and the naive loop of the official release.

    python examples/bench_step.py                # T5-small's size, 8 x 128 source and 16 target tokens, T = 15 and 50
    python examples/bench_step.py --json step.json

All variants run in one process, one after another in every round, on the same batch; a ratio is the median over rounds
of the variant's time over plain LoRA's in the same round, with the quartiles. Blocks are random and non-zero.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from benching import alternate, quartiles, saved_bytes, table
from peers import naive_sum
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from peft_sapt import SaptConfig
from peft_sapt.layer import SaptLayer


def t5_small(seed: int = 0) -> nn.Module:
    """T5-small's architecture with random weights: six layers each side, width 512, eight heads."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=6, num_heads=8,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class NaiveLayer(nn.Module):
    """A layer of the pool that adds its blocks as the official release does."""

    def __init__(self, layer: SaptLayer, ranks: list[int]) -> None:
        super().__init__()
        self.base_layer, self.routing = layer.get_base_layer(), layer.routing
        self.scaling = layer.configs["default"].scalings[0]
        a, b = (layer.parts(name, "default", ranks) for name in ("sapt_A", "sapt_B"))
        self.old = nn.ParameterList([nn.Parameter(p.clone(), requires_grad=False) for p in a[:-1] + b[:-1]])
        self.new_a, self.new_b = nn.Parameter(a[-1].clone()), nn.Parameter(b[-1].clone())

    def forward(self, x: Tensor) -> Tensor:
        weights = self.routing.weights * self.scaling  # [B, T]
        half = len(self.old) // 2
        old = list(zip(self.old[:half], self.old[half:], strict=True))
        return naive_sum(x, self.base_layer(x), old, (self.new_a, self.new_b), weights)


def naive(model: nn.Module) -> nn.Module:
    """A copy of a pool whose layers are replaced by the naive ones."""
    model = copy.deepcopy(model)
    ranks = model.peft_config["default"].task_ranks
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SaptLayer):
                setattr(parent, name, NaiveLayer(child, ranks))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[15, 50])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--target", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--no-naive", action="store_true", help="leave the naive loop out (it is slow and large)")
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    torch.manual_seed(1)
    batch = {
        "input_ids": torch.randint(2, 32000, (args.batch, args.source)),
        "labels": torch.randint(2, 32000, (args.batch, args.target)),
    }
    found: dict[str, dict] = {}
    for count in args.tasks:
        tasks = [f"task_{i}" for i in range(count)]
        common = {"task_type": "SEQ_2_SEQ_LM", "r": args.rank, "lora_alpha": 32, "target_modules": ["q", "v"]}
        pool = get_peft_model(t5_small(), SaptConfig(tasks=tasks, init_weights=False, **common))
        released = copy.deepcopy(pool)
        released.peft_config["default"].old_block_gradient = False
        for module in released.modules():
            if isinstance(module, SaptLayer):
                module.configs["default"].old_block_gradient = False
        models = {"plain LoRA": get_peft_model(t5_small(), LoraConfig(init_lora_weights=False, **common))}
        models |= {"pool": pool, "pool, gradient cut as released": released}
        if not args.no_naive:
            models["naive loop"] = naive(pool)
        for model in models.values():
            model.train()

        def step(model: nn.Module) -> Callable[[], None]:
            def run() -> None:
                model(**batch).loss.backward()
                model.zero_grad(set_to_none=True)

            return run

        times = alternate({name: step(model) for name, model in models.items()}, args.rounds)
        saved = {name: saved_bytes(model, lambda model=model: model(**batch).loss) for name, model in models.items()}
        rows = []
        for name in models:
            low, middle, high = quartiles(times[name], times["plain LoRA"])
            megabytes, ratio = saved[name] / 1e6, saved[name] / saved["plain LoRA"]
            rows.append([name, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{megabytes:.0f}", f"{ratio:.2f}"])
        print(f"T = {count}, r = {args.rank}, {args.batch} x {args.source} source and {args.target} target tokens, "
              f"{torch.get_num_threads()} threads, {args.rounds} rounds")  # fmt: skip
        print(table(["", "time / plain LoRA", "saved activations, MB", "/ plain LoRA"], rows), flush=True)
        found[str(count)] = {"seconds": times, "saved_bytes": saved}
    if args.json:
        args.json.write_text(json.dumps({"settings": {**vars(args), "json": None}, "tasks": found}, indent=1))


if __name__ == "__main__":
    main()
