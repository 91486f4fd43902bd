"""Time and memory of a training step with a pool, against plain PEFT LoRA and the naive loop of the official release.

    python examples/bench_step.py                # T5-small's size, 8 x 128 source and 16 target tokens, T = 15 and 50
    python examples/bench_step.py --json step.json
    python examples/bench_step.py --model llama-1b --dtype bfloat16 --source 496       # on a GPU

All variants run in one process, one after another in every round, on the same batch; a ratio is the median over rounds
of the variant's time over plain LoRA's in the same round, with the quartiles. Blocks are random and non-zero. In
bfloat16 a step runs under autocast, as with the Trainer's ``bf16=True``: the base is bfloat16, blocks are float32.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from benching import alternate, quartiles, saved_bytes, table, where, with_kernel
from peers import naive_sum
from peft import LoraConfig, get_peft_model
from random_models import SIZES, random_model
from torch import Tensor, nn

from peft_sapt import SaptConfig
from peft_sapt.layer import SaptLayer


class NaiveLayer(nn.Module):
    """A layer of the pool that adds its blocks as the official release does."""

    def __init__(self, layer: SaptLayer, ranks: list[int]) -> None:
        super().__init__()
        self.base_layer, self.state = layer.get_base_layer(), layer.forward_state
        self.scaling = layer.configs["default"].scalings[0]
        a, b = (layer.parts(name, "default", ranks) for name in ("sapt_A", "sapt_B"))
        self.old = nn.ParameterList([nn.Parameter(p.clone(), requires_grad=False) for p in a[:-1] + b[:-1]])
        self.new_a, self.new_b = nn.Parameter(a[-1].clone()), nn.Parameter(b[-1].clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.state.blocks_are_off:
            return self.base_layer(x)
        weights = self.state.weights * self.scaling  # [B, T]
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


def random_batch(args: argparse.Namespace, causal: bool, device: str) -> dict[str, Tensor]:
    """Source and target: of a decoder-only model in one sequence, whose labels are the last tokens."""
    source, target = (torch.randint(2, 32000, (args.batch, n), device=device) for n in (args.source, args.target))
    if not causal:
        return {"input_ids": source, "labels": target}
    labels = torch.cat([torch.full_like(source, -100), target], dim=1)
    return {"input_ids": torch.cat([source, target], dim=1), "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(SIZES), default="t5-small", help="size; weights are random")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument("--kernels", nargs="*", default=[], help="implementations of the op to time too")
    parser.add_argument("--tasks", type=int, nargs="+", default=[15, 50])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--source", type=int, default=128)
    parser.add_argument("--target", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--no-naive", action="store_true", help="leave the naive loop out (it is slow and large)")
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    causal = not SIZES[args.model].is_encoder_decoder
    torch.manual_seed(1)
    batch = random_batch(args, causal, device)
    common = {"task_type": "CAUSAL_LM" if causal else "SEQ_2_SEQ_LM", "r": args.rank, "lora_alpha": 32}
    common |= {"target_modules": ["q_proj", "v_proj"] if causal else ["q", "v"]}
    found: dict[str, dict] = {}
    for count in args.tasks:
        tasks = [f"task_{i}" for i in range(count)]
        own = SaptConfig(tasks=tasks, init_weights=False, **common)
        pool = get_peft_model(random_model(args.model, dtype, device), own)
        official = copy.deepcopy(pool)
        official.peft_config["default"].old_block_gradient = False
        for module in official.modules():
            if isinstance(module, SaptLayer):
                module.configs["default"].old_block_gradient = False
        plain = LoraConfig(init_lora_weights=False, **common)
        models = {"plain LoRA": get_peft_model(random_model(args.model, dtype, device), plain)}
        models |= {"pool": pool, "pool, gradient cut as in the official code": official}
        if not args.no_naive:
            models["naive loop"] = naive(pool)
        for model in models.values():
            model.train()

        def loss(model: nn.Module) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return model(**batch).loss

        def step(model: nn.Module) -> Callable[[], None]:
            def run() -> None:
                loss(model).backward()
                model.zero_grad(set_to_none=True)

            return run

        runs = {name: step(model) for name, model in models.items()}
        runs |= {f"pool, kernel {k}": with_kernel(k, runs["pool"]) for k in args.kernels}
        times = alternate(runs, args.rounds)
        saved = {name: saved_bytes(model, lambda model=model: loss(model)) for name, model in models.items()}
        rows = []
        for name in runs:
            low, middle, high = quartiles(times[name], times["plain LoRA"])
            own = saved[name if name in saved else "pool"]
            megabytes, ratio = own / 1e6, own / saved["plain LoRA"]
            rows.append([name, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{megabytes:.0f}", f"{ratio:.2f}"])
        print(f"T = {count}, r = {args.rank}, {args.batch} x {args.source} source and {args.target} target tokens, "
              f"{args.model}, {args.dtype}, {where()}, {args.rounds} rounds")  # fmt: skip
        print(table(["", "time / plain LoRA", "saved activations, MB", "/ plain LoRA"], rows), flush=True)
        found[str(count)] = {"seconds": times, "saved_bytes": saved}
        del models, pool, official
    if args.json:
        args.json.write_text(
            json.dumps({"settings": {**vars(args), "json": None}, "where": where(), "tasks": found}, indent=1)
        )


if __name__ == "__main__":
    main()
