"""Generation with a pool: tokens per second against plain PEFT LoRA, X-LoRA and Arrow, and the cost of long pools.

    python examples/bench_generate.py                       # SmolLM2-135M, T = 15, 8 rows of 64 tokens, 64 new tokens
    python examples/bench_generate.py --long 15 1000        # a token at batch 1 as the pool grows

The first alternates all variants in one process on the same blocks (X-LoRA and Arrow load them as `export_task` writes
them) and prints tokens per second over plain LoRA's. The second draws each prompt's weights from those recorded in a
real run (`results/attention_long_sequence.json`): the share of its own task, and what is left over spread over the
other tasks in recorded proportions; it times single tokens in the exact mode and with `min_weight`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from benching import alternate, quartiles, table, timed, where, with_kernel
from peft import ArrowConfig, LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from random_models import SIZES, random_model
from torch import Tensor

from peft_sapt import SaptConfig
from peft_sapt.compat import cache_argument
from peft_sapt.continual.base import best_device, load_base
from peft_sapt.layer import SaptLayer
from peft_sapt.ops.bound import block_norms, dropped_bound

RECORDED = Path(__file__).parent / "results" / "attention_long_sequence.json"


def prompts(base: Callable, rows: int, length: int) -> Tensor:
    """Random token ids [rows, length], where the model is."""
    model = base()
    return torch.randint(4, model.config.vocab_size, (rows, length)).to(model.device)


def pool_of(base: Callable, count: int, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    tasks = [f"task_{i}" for i in range(count)]
    return get_peft_model(base(), SaptConfig(task_type="CAUSAL_LM", tasks=tasks, init_weights=False, **config)).eval()


def compare(args: argparse.Namespace, base: Callable) -> dict:
    """Tokens per second of every variant over those of plain LoRA."""
    pool = pool_of(base, args.tasks, r=args.rank)
    ids = prompts(base, args.batch, args.prompt)
    settings = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=args.rank, init_lora_weights=False)).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}" for name in pool.tasks]
        for name, path in zip(pool.tasks, paths, strict=True):
            pool.export_task(name, path)
        arrow = create_arrow_model(base(), paths, ArrowConfig(top_k=args.tasks)).eval()
        xlora = xlora_model(base(), paths) if args.slow_rounds else None
    print(f"T = {args.tasks}, r = {args.rank}, {args.batch} rows of {args.prompt} tokens, {args.new} new tokens, "
          f"{args.model}, {args.dtype}, {where()}")  # fmt: skip
    runs = {
        "plain LoRA": lambda: plain.generate(**inputs, **settings),
        "pool": lambda: pool.generate(**inputs, **settings),
        **{f"pool, kernel {k}": with_kernel(k, lambda: pool.generate(**inputs, **settings)) for k in args.kernels},
        "pool, one task by name": lambda: pool.generate(**inputs, **settings, sapt_task=pool.tasks[0]),
        "Arrow": lambda: arrow.generate(**inputs, **settings),
    }
    found = {"fast": alternate(runs, args.rounds), "slow": {}}
    show_rates(found["fast"], args.batch * args.new)
    if xlora is not None:
        slow = {
            "plain LoRA": runs["plain LoRA"],
            "pool, without cache": lambda: pool.generate(**inputs, **settings, use_cache=False),
            "X-LoRA (has no cache)": lambda: xlora.generate(**inputs, **settings, use_cache=False),
        }
        found["slow"] = alternate(slow, args.slow_rounds, warmup=0)
        show_rates(found["slow"], args.batch * args.new)
    return found


def xlora_model(base: torch.nn.Module, paths: list[str]) -> torch.nn.Module:
    """X-LoRA over the LoRA folders in ``paths``; no cache, as its weights are those of the whole sequence."""
    base.config.use_cache = False
    adapters = {str(number): path for number, path in enumerate(paths)}
    width = base.config.hidden_size
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=width, xlora_depth=2, adapters=adapters)
    return get_peft_model(base, config).eval()


def show_rates(times: dict[str, list[float]], tokens: int) -> None:
    """Tokens per second of each variant, and over plain LoRA's in the same rounds."""
    rows = []
    for name, seconds in times.items():
        low, middle, high = quartiles(times["plain LoRA"], seconds)  # speeds, so the ratio is turned over
        rate = tokens / sorted(seconds)[len(seconds) // 2]
        rows.append([name, f"{rate:.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})", str(len(seconds))])
    print(table(["", "tokens/s", "over plain LoRA", "rounds"], rows), flush=True)


def drawn_weights(count: int, generator: torch.Generator) -> Tensor:
    """Weights [T] of one prompt: a recorded own weight, the rest in recorded proportions over the other tasks."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    rows = [(torch.tensor(row), i) for i, name in enumerate(recorded["tasks"])
            for row in recorded["prompt_weights"][name]]  # fmt: skip
    row, own = rows[int(torch.randint(len(rows), (1,), generator=generator))]
    others = torch.cat([torch.cat([r[:i], r[i + 1 :]]) for r, i in rows])
    picked = others[torch.randint(len(others), (count,), generator=generator)]
    weights = picked / picked.sum() * (1 - row[own])
    weights[int(torch.randint(count, (1,), generator=generator))] += row[own]
    return weights / weights.sum()


def long_pools(args: argparse.Namespace, base: Callable) -> dict:
    """Milliseconds per token at batch 1 for pools of several lengths, exact and with min_weight."""
    generator = torch.Generator().manual_seed(0)
    pools = {count: pool_of(base, count, r=args.rank, lora_alpha=1) for count in args.long}
    ids = prompts(base, 1, args.prompt)
    weights = {count: drawn_weights(count, generator) for count in pools}
    quantiles = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    own = torch.tensor([r[i] for i, n in enumerate(recorded["tasks"]) for r in recorded["prompt_weights"][n]])
    print("recorded own weights, quantiles 0, 5, 25, 50, 75, 95, 100 %: "
          + ", ".join(f"{q:.3f}" for q in own.quantile(quantiles).tolist()))  # fmt: skip

    def token(count: int, kept: bool) -> Callable[[], None]:
        pool, row = pools[count], weights[count]
        name = cache_argument(pool.get_base_model())
        if kept:
            row = torch.where(row < args.min_weight, 0.0, row)
        with torch.no_grad():
            cache = pool(input_ids=ids, sapt_weights=row[None], use_cache=True)[name]

        def run() -> None:
            with torch.no_grad():
                pool(input_ids=ids[:, :1], use_cache=True, **{name: cache})
                cache.crop(-1)

        return run

    runs = {}
    for count in pools:
        runs[f"T = {count}, exact"] = token(count, kept=False)
        runs[f"T = {count}, min_weight {args.min_weight}"] = token(count, kept=True)
    times = alternate(runs, args.rounds * 5, warmup=3)
    first = f"T = {args.long[0]}, min_weight {args.min_weight}"
    rows = []
    for name, seconds in times.items():
        low, middle, high = quartiles(seconds, times[first])
        milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
        rows.append([name, f"{milliseconds:.1f}", f"{middle:.3f} ({low:.3f} to {high:.3f})"])
    print(table(["", "ms per token", f"over {first}"], rows))
    medians = {count: sorted(times[f"T = {count}, exact"])[args.rounds * 5 // 2] for count in pools}
    print("exact, " + fitted(medians))
    for count, pool in pools.items():
        layer = next(m for m in pool.modules() if isinstance(m, SaptLayer))
        parts = [[part.cpu() for part in layer.parts(name, "default", [args.rank] * count)]
                 for name in ("sapt_A", "sapt_B")]  # fmt: skip
        dropped = weights[count] < args.min_weight
        scale = pool.peft_config["default"].scalings
        bound = dropped_bound(weights[count], dropped, block_norms(*parts), scale)
        total = dropped_bound(weights[count], torch.ones_like(dropped), block_norms(*parts), scale)
        share = float(weights[count][dropped].sum())
        print(f"T = {count}: {int(dropped.sum())} blocks dropped, {share:.4f} of the weight; an output moves by "
              f"at most {bound:.3g} |x|, all blocks together by {total:.3g} |x|")  # fmt: skip
    return times


def steps(args: argparse.Namespace, base: Callable) -> dict:
    """Seconds of a training step and bytes of the pool as it grows."""
    ids = prompts(base, 2, args.prompt)
    labels = ids.clone()
    labels[:, : args.prompt // 2] = -100
    found = {}
    rows = []
    for count in args.long:
        pool = pool_of(base, count, r=args.rank).train()
        state = sum(p.numel() * p.element_size() for n, p in pool.named_parameters() if ".sapt_" in n)
        seconds = []
        for _ in range(args.rounds):
            seconds.append(timed(lambda pool=pool: pool(input_ids=ids, labels=labels).loss.backward()))
        found[count] = sorted(seconds)[len(seconds) // 2]
        rows.append([str(count), f"{state / 1e6:.0f}", f"{found[count]:.2f}"])
        del pool
    print(table(["T", "pool, MB", "seconds per step"], rows))
    print(fitted(found))
    return found


def fitted(seconds: dict[int, float]) -> str:
    """A line through seconds by number of tasks."""
    a = torch.tensor([[1.0, count] for count in seconds], dtype=torch.float64)
    fit = torch.linalg.lstsq(a, torch.tensor(list(seconds.values()), dtype=torch.float64)).solution.tolist()
    return f"least squares: {fit[0] * 1e3:.1f} ms + {fit[1] * 1e3:.4f} ms per task"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help=f"smollm2, a Hub id or folder, or one of {list(SIZES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the base model")
    parser.add_argument(
        "--kernels", nargs="*", default=[], help="implementations of the op to compare, as torch triton"
    )
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--tasks", type=int, default=15)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow-rounds", type=int, default=9, help="rounds of the variants without a cache; 0: none")
    parser.add_argument("--long", type=int, nargs="+", help="pool lengths for the cost of a token at batch 1")
    parser.add_argument("--step", action="store_true", help="with --long: time training steps instead")
    parser.add_argument("--min-weight", type=float, default=0.01)
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    if args.model in SIZES:
        loaded = random_model(args.model, getattr(torch, args.dtype), best_device()).eval()
    else:
        loaded, _ = load_base(args.model, args.cache, getattr(torch, args.dtype))

    def base() -> torch.nn.Module:
        return copy.deepcopy(loaded)

    job = compare if not args.long else steps if args.step else long_pools
    found = job(args, base)
    if args.json:
        settings = {k: str(v) for k, v in vars(args).items()}
        args.json.write_text(
            json.dumps({"settings": settings, "where": where(), "seconds": found}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
