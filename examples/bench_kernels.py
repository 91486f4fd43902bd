"""The op on one layer: its implementations and its peers, forward and backward, beside the floor of the machine.

    python examples/bench_kernels.py                     # float32 on CPU, bfloat16 on a GPU
    python examples/bench_kernels.py --json kernels.json

All variants compute on the same random blocks, with other weights in every row, in one process and one after another
in every round; a ratio is the median over rounds with its quartiles. The numerics come first: what computes the same
sum is compared with float64. On a GPU times are those of events. The last lines name what lost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from benching import alternate, quartiles, saved_bytes, table
from peers import arrow, naive_sum, peft_layer, xlora
from torch import Tensor

from peft_sapt.ops.devtools import floors, numerics, timings
from peft_sapt.ops.devtools.floors import Shape

ON_CPU = (
    Shape(8, 128, 512, 512, 1, 4), Shape(8, 128, 512, 512, 2, 4), Shape(8, 128, 512, 512, 15, 4),
    Shape(8, 128, 512, 512, 50, 4), Shape(8, 512, 1024, 1024, 15, 8), Shape(1, 1, 1024, 1024, 15, 4),
    Shape(8, 1, 1024, 1024, 15, 4), Shape(8, 1, 1024, 1024, 200, 4),
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "plain LoRA (one block)"
SAME = ("naive loop", "X-LoRA")  # peers that compute this very sum


def variants(shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Callable[[], Tensor]], dict]:
    """Each variant as a call without arguments, and the tensors behind them."""
    p = timings.problem(shape, dtype, device)
    a, b = (torch.cat([p[f"old_{c}"], p[f"new_{c}"].detach()]).split(shape.rank) for c in "ab")
    blocks = list(zip(a, b, strict=True))
    one, many = peft_layer(p["base"], blocks[-1:]), peft_layer(p["base"], blocks)
    loop, routed = xlora(many, p["weights"].to(dtype), shape.length), arrow(p["base"], blocks)
    runs = {
        PLAIN: lambda: one(p["x"]),
        "pool, torch": lambda: timings.fused(p, shape, "torch"),
        "naive loop": lambda: naive_sum(
            p["x"], p["base"], blocks[:-1], (p["new_a"], p["new_b"]), p["weights"].to(dtype)
        ),
        "X-LoRA": lambda: loop(p["x"]),
        "Arrow": lambda: routed(p["x"]),
    }
    if device == "cuda":
        runs["pool, triton"] = lambda: timings.fused(p, shape, "triton")
    return runs, p


def compare(shape: Shape, dtype: torch.dtype, device: str, rounds: int, top: timings.Ceilings) -> dict:
    """Checks the values, then times a forward without gradient and a forward with backward."""
    runs, p = variants(shape, dtype, device)
    exact = timings.naive({k: v.detach().double() for k, v in p.items()}, shape)
    limit = numerics.TOLERANCE[dtype] * 2  # the peers add T rounded outputs
    errors = {name: numerics.relative(runs[name](), exact) for name in runs if name in SAME or name.startswith("pool")}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        sys.exit(f"{floors.name(shape)}: wrong before any timing, relative to float64 (limit {limit}): {wrong}")
    dy = torch.randn_like(p["base"])

    def backward(run: Callable[[], Tensor]) -> Callable[[], None]:
        def both() -> None:
            run().backward(dy)

        return both

    with torch.no_grad():
        forward = alternate(runs, rounds, warmup=2)
    both = alternate({name: backward(run) for name, run in runs.items()}, rounds, warmup=2)
    owner = torch.nn.ParameterList([v for v in p.values() if v.is_leaf and v.dim() == 2 and v is not p["weights"]])
    saved = {name: saved_bytes(owner, lambda run=run: run().sum()) for name, run in runs.items()}
    ahead = floors.forward(shape, dtype.itemsize).seconds(*top)
    back = floors.backward(shape, dtype.itemsize).seconds(*top)
    rows = []
    for name in runs:
        row = [name]
        for times, floor in ((forward, ahead), (both, ahead + back)):
            low, middle, high = quartiles(times[name], times[PLAIN])
            typical = sorted(times[name])[len(times[name]) // 2]
            row += [
                f"{typical * 1e3:.3f}",
                f"{middle:.2f} ({low:.2f} to {high:.2f})",
                "" if name == PLAIN else f"{typical / floor:.1f}",
            ]
        rows.append([*row, f"{saved[name] / 1e6:.2f}"])
    print(f"\n{floors.name(shape)}; floors {ahead * 1e3:.3f} and {(ahead + back) * 1e3:.3f} ms; errors "
          + ", ".join(f"{name} {error:.0e}" for name, error in errors.items()))  # fmt: skip
    head = ["", "forward, ms", "/ plain LoRA", "x floor", "both, ms", "/ plain LoRA", "x floor", "saved, MB"]
    print(table(head, rows), flush=True)
    return {"errors": errors, "forward": forward, "forward and backward": both, "saved": saved,
            "floors": [ahead, ahead + back]}  # fmt: skip


def losses(found: dict[str, dict]) -> list[str]:
    """Where a peer with the same pool was faster than the pool's best implementation."""
    lost = []
    for shape, result in found.items():
        for what in ("forward", "forward and backward"):
            times = result[what]
            best = min((n for n in times if n.startswith("pool")), key=lambda n: quartiles(times[n], times[PLAIN])[1])
            for peer in (*SAME, "Arrow"):
                ratio = quartiles(times[best], times[peer])[1]
                if ratio > 1:
                    lost.append(f"{shape}, {what}: {ratio:.2f} times the time of {peer}")
    return lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="by default float32 on CPU, bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--shape", type=int, nargs=6, action="append",
                        metavar=("BATCH", "LENGTH", "IN", "OUT", "TASKS", "RANK"))  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all times here")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype or ("bfloat16" if device == "cuda" else "float32")]
    shapes = [Shape(*s) for s in args.shape or ()] or (floors.SHAPES if device == "cuda" else ON_CPU)
    torch.manual_seed(0)
    top = timings.ceilings(device, dtype)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads, no GPU"
    print(f"{where}, {dtype}; copy {top.bandwidth / 1e9:.1f} GB/s, product {top.rate / 1e9:.0f} GFLOP/s")
    found = {floors.name(shape): compare(shape, dtype, device, args.rounds, top) for shape in shapes}
    lost = losses(found)
    print("\nlost to a peer with the same pool: " + ("; ".join(lost) if lost else "nowhere"))
    if args.json:
        args.json.write_text(json.dumps({"where": where, "ceilings": top._asdict(), "shapes": found}, indent=1))


if __name__ == "__main__":
    main()
