"""Times of the op's implementations on one device, beside the floor that its own copy and product speeds set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference, scaled
from . import floors
from .floors import Shape


class Ceilings(NamedTuple):
    """Measured on the device: bytes per second of a copy, operations per second of a large product."""

    bandwidth: float
    rate: float


class Timing(NamedTuple):
    """Milliseconds of a forward or of forward and backward, and of its floor."""

    shape: Shape
    what: str
    floor: float
    by: dict[str, float]


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median time of ``run``: by events, with a cold L2 cache, on CUDA; else by the clock over 9 runs."""
    if device == "cuda":
        import triton

        return float(triton.testing.do_bench(run, return_mode="median"))
    run()
    seconds = []
    for _ in range(9):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2] * 1e3


def ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Bytes per second of a large copy and operations per second of a large product in ``dtype`` on ``device``."""
    size, edge = (1 << 30, 8192) if device == "cuda" else (1 << 26, 1024)
    data = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(data)
    square = torch.randn(edge, edge, device=device).to(dtype)
    copied = milliseconds(lambda: target.copy_(data), device)
    multiplied = milliseconds(lambda: square @ square, device)
    return Ceilings(2e3 * size / copied, 2e3 * edge**3 / multiplied)


def problem(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random tensors of a layer: x, base, frozen rows old_a and old_b, a new block, weights that differ by row."""
    old = (shape.tasks - 1) * shape.rank

    def random(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    trained = {
        "x": random(shape.batch, shape.length, shape.width), "base": random(shape.batch, shape.length, shape.out),
        "new_a": random(shape.rank, shape.width), "new_b": random(shape.rank, shape.out),
        "weights": torch.randn(shape.batch, shape.tasks, device=device).softmax(dim=-1),
    }  # fmt: skip
    frozen = {"old_a": random(old, shape.width), "old_b": random(old, shape.out)}
    return {**{name: value.requires_grad_() for name, value in trained.items()}, **frozen}


def naive(p: dict[str, Tensor], shape: Shape) -> Tensor:
    """By definition, one block after another."""
    a = torch.cat([p["old_a"], p["new_a"]]).split(shape.rank)
    b = [part.mT for part in torch.cat([p["old_b"], p["new_b"]]).split(shape.rank)]
    return reference.weighted_lora(p["x"], p["base"], a, b, p["weights"], [1.0] * shape.tasks)


def fused(p: dict[str, Tensor], shape: Shape, kernel: str) -> Tensor:
    return scaled.weighted_lora(
        p["x"], p["base"], p["old_a"] if shape.tasks > 1 else None, p["old_b"] if shape.tasks > 1 else None,
        p["new_a"], p["new_b"], p["weights"], [1.0] * shape.tasks, [shape.rank] * (shape.tasks - 1), kernel=kernel,
    )  # fmt: skip


def measure(
    shapes: Iterable[Shape], kernels: Iterable[str], dtype: torch.dtype, device: str, top: Ceilings
) -> list[Timing]:
    """Forward without gradient, and forward with backward, of each kernel and of the naive loop."""
    found = []
    for shape in shapes:
        p = problem(shape, dtype, device)
        trained = [value for value in p.values() if value.requires_grad]
        dy = torch.randn_like(p["base"])
        runs: dict[str, Callable[[], Tensor]] = {
            k: lambda k=k, p=p, shape=shape: fused(p, shape, k)  # type: ignore[misc]  # lambdas that bind a loop's values
            for k in kernels
        }
        runs["naive"] = lambda p=p, shape=shape: naive(p, shape)  # type: ignore[misc]  # lambdas that bind a loop's values
        ahead, back = floors.forward(shape, dtype.itemsize), floors.backward(shape, dtype.itemsize)
        with torch.no_grad():
            times = {name: milliseconds(run, device) for name, run in runs.items()}
        found.append(Timing(shape, "forward", ahead.seconds(*top) * 1e3, times))
        times = {
            name: milliseconds(lambda run=run, trained=trained, dy=dy: torch.autograd.grad(run(), trained, dy), device)  # type: ignore[misc]  # lambdas that bind a loop's values
            for name, run in runs.items()
        }
        both = ahead.seconds(*top) + back.seconds(*top)
        found.append(Timing(shape, "forward + backward", both * 1e3, times))
    return found


def table(timings: list[Timing]) -> str:
    """Milliseconds and multiples of the floor; a row where the naive loop is faster says so."""
    names = list(timings[0].by)
    lines = ["| shape | | floor, ms | " + " | ".join(f"{n}, ms (x floor)" for n in names) + " | |",
             "|---" * (4 + len(names)) + "|"]  # fmt: skip
    for t in timings:
        cells = [f"{t.by[n]:.4f} ({t.by[n] / t.floor:.1f})" for n in names]
        verdict = "loses to naive" if t.by[names[0]] > t.by["naive"] else ""
        lines.append(f"| {floors.name(t.shape)} | {t.what} | {t.floor:.4f} | " + " | ".join(cells) + f" | {verdict} |")
    return "\n".join(lines)
