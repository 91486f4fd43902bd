"""What the op must move and compute at least, and how close to that each implementation can come.

    python -m peft_sapt.ops.devtools.floors          # the tables of README.md beside this file

A pass is one reading or writing of a [tokens, width] array. The op cannot do with less than three in its forward (x
and base in, y out) and three in its backward (dy and x in, dx out); h and the factors are small beside them until the
sum of all ranks R comes near the width.
"""

from __future__ import annotations

from typing import NamedTuple

# datasheets of the SXM modules: bytes per second of memory, dense bfloat16 operations per second
GPUS = {"A100 80 GB": (2.039e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}


class Shape(NamedTuple):
    """x [batch, length, width] -> [batch, length, out] with ``tasks`` blocks of rank ``rank``."""

    batch: int
    length: int
    width: int
    out: int
    tasks: int
    rank: int

    @property
    def ranks(self) -> int:
        return self.tasks * self.rank

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Cost(NamedTuple):
    flops: float
    bytes: float

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The larger of the two floors."""
        return max(self.bytes / bandwidth, self.flops / rate)


def forward(shape: Shape, itemsize: int = 2) -> Cost:
    """y = base + (x A^T * g) B: two products; x, base, A, B and the scales in, y and h out."""
    n, r, both = shape.tokens, shape.ranks, shape.width + shape.out
    elements = n * (shape.width + 2 * shape.out) + r * both + n * r
    return Cost(2.0 * n * r * both, itemsize * elements + 4.0 * shape.batch * r)


def backward(shape: Shape, itemsize: int = 2) -> Cost:
    """dx and dg of all ranks, dA and dB of the newest block: dy, x, h, A, B in, dx out."""
    n, r, both = shape.tokens, shape.ranks, shape.width + shape.out
    elements = n * (2 * shape.width + shape.out) + r * both + n * r + shape.rank * both
    return Cost(2.0 * n * (r + shape.rank) * both, itemsize * elements + 8.0 * shape.batch * r)


def base_linear(shape: Shape, itemsize: int = 2) -> Cost:
    """The frozen layer itself, for comparison."""
    n = shape.tokens
    elements = n * (shape.width + shape.out) + shape.width * shape.out
    return Cost(2.0 * n * shape.width * shape.out, itemsize * elements)


def passes(tasks: int) -> dict[str, tuple[float, float, str]]:
    """Passes over [tokens, width] of a forward and of a backward, for width = out, and where they come from."""
    return {
        "floor": (3, 3, "x and base in, y out; dy and x in, dx out"),
        "triton": (3, 4, "forward as the floor, where L2 serves x to all rank tiles; backward: dy once more for dB"),
        "torch": (8, 7, "forward: x for frozen and for newest rows, base copied to y, y read and written by both "
                  "products; backward: dy twice, dx written, read and written, x for dA, dy for dB"),
        "naive loop of the official release": (
            7 * tasks + 4, 6 * tasks + 4, "forward, per task: x read, its output written, stacked (2), weighted (2), "
            "summed; then the sum and base; backward, per task: gradient of the stack (2), of the weights (4); then "
            "the newest block"),
    }  # fmt: skip


SHAPES = (
    Shape(8, 512, 4096, 4096, 2, 4), Shape(8, 512, 4096, 4096, 15, 4), Shape(8, 512, 4096, 4096, 50, 8),
    Shape(8, 512, 4096, 4096, 200, 8), Shape(1, 1, 4096, 4096, 15, 4), Shape(32, 1, 4096, 4096, 15, 4),
    Shape(8, 128, 512, 512, 15, 4),
)  # fmt: skip


def name(shape: Shape) -> str:
    return f"{shape.batch} x {shape.length}, {shape.width} -> {shape.out}, T = {shape.tasks}, r = {shape.rank}"


def tables() -> str:
    """Floors in microseconds on each GPU, and passes of each implementation."""
    lines = ["| shape (bfloat16) | GFLOP | MB | " + " | ".join(GPUS) + " | share of the base layer, H100 |",
             "|---|---|---|" + "---|" * (len(GPUS) + 1)]  # fmt: skip
    for shape in SHAPES:
        cost, base = forward(shape), base_linear(shape)
        times = [cost.seconds(*gpu) * 1e6 for gpu in GPUS.values()]
        bound = ["memory" if cost.bytes / b >= cost.flops / r else "compute" for b, r in GPUS.values()]
        cells = [f"{time:.2f} µs, {kind}" for time, kind in zip(times, bound, strict=True)]
        share = cost.seconds(*GPUS["H100"]) / base.seconds(*GPUS["H100"])
        lines.append(f"| {name(shape)} | {cost.flops / 1e9:.3f} | {cost.bytes / 1e6:.2f} | " + " | ".join(cells)
                     + f" | {100 * share:.0f} % |")  # fmt: skip
    lines += ["", "| implementation | passes forward | passes backward | at most, of the floor's speed | from |",
              "|---|---|---|---|---|"]  # fmt: skip
    for count in (15, 50):
        for label, (ahead, back, why) in passes(count).items():
            if count == 15 or label.startswith("naive"):
                title = f"{label}, T = {count}" if label.startswith("naive") else label
                lines.append(f"| {title} | {ahead:g} | {back:g} | {300 / ahead:.0f} %, {300 / back:.0f} % | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
