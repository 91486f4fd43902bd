"""Errors of an implementation against float64, with NaN wherever nothing may be read and in all memory not written.

    TRITON_INTERPRET=1 python -m peft_sapt.ops.devtools.numerics triton cpu     # the Triton kernels without a GPU
    python -m peft_sapt.ops.devtools.numerics triton cuda

An error is ``|found - exact| / |exact|`` in the Euclidean norm; the exact values come from [`reference`] in float64 on
the same rounded inputs. NaN counts as infinite.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, scaled

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """A problem: x [batch, length, width] -> [batch, length, out] with ``tasks`` blocks of rank ``rank``."""

    batch: int
    length: int
    width: int
    out: int
    tasks: int
    rank: int
    per_token: bool = False
    old_gradient: bool = True
    shift: int = 64  # elements before each input; odd numbers break the 16-byte alignment
    strided: bool = False


SMALL = (
    Case(3, 17, 100, 40, 3, 5),  # odd sizes; x has aligned rows in no dtype of 16 bits
    Case(2, 40, 64, 96, 1, 5),  # one task: no frozen rows
    Case(5, 1, 272, 70, 4, 3),  # few rows: all tokens in one tile, the width cut into parts
    Case(2, 20, 48, 72, 64, 1),  # 64 tasks
    Case(2, 9, 40, 24, 6, 4, per_token=True),
    Case(2, 33, 64, 64, 3, 4, old_gradient=False),
    Case(2, 18, 56, 80, 4, 3, shift=61),
    Case(3, 16, 72, 56, 2, 7, strided=True),
)
LARGE = (Case(4, 512, 4096, 4096, 15, 4), Case(1, 1, 4096, 11008, 50, 8), Case(2, 700, 2048, 512, 100, 8))


def limit(case: Case | None, dtype: torch.dtype) -> float:
    """The largest error that rounding explains; None is for the small sizes at which each tile is tried.

    A float32 sum of K products that is added up one after another, as a tile does, is wrong by about the root of K
    units; what is not float32 is rounded more coarsely at its end, whatever K is.
    """
    longest = 0 if case is None else max(case.width, case.out, case.batch * case.length)
    return TOLERANCE[dtype] * (max(1.0, math.sqrt(longest / 256)) if dtype == torch.float32 else 1.0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN meanwhile, so that whatever is not written shows."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic  # whose attribute is set by name, unseen by a type checker
    filled = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        switch.fill_uninitialized_memory = filled


def among_nan(values: Tensor, shift: int = 64, strided: bool = False) -> Tensor:
    """``values`` [N, K] in the midst of NaN: before and after them, with ``strided`` also at the end of each row."""
    rows, columns = values.shape
    gap = 7 if strided else 0
    storage = torch.full((shift + rows * (columns + gap) + 512,), torch.nan, dtype=values.dtype, device=values.device)
    view = storage.as_strided((rows, columns), (columns + gap, 1), shift)
    return view.copy_(values)


def relative(found: Tensor, exact: Tensor) -> float:
    error = float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())
    return error if math.isfinite(error) else math.inf


def errors(case: Case, dtype: torch.dtype, device: str, kernel: str) -> dict[str, float]:
    """Errors of y and of the gradients of x, base, weights and of the newest block."""
    generator = torch.Generator().manual_seed(sum(case))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def placed(values: Tensor) -> Tensor:
        return among_nan(values.to(device, dtype), case.shift, case.strided).requires_grad_()

    tokens, old = case.batch * case.length, (case.tasks - 1) * case.rank
    x, base, dy = (placed(random(tokens, n)) for n in (case.width, case.out, case.out))
    a = [placed(random(case.rank, case.width) / case.width**0.5) for _ in range(case.tasks)]
    b = [placed(random(case.rank, case.out) / case.rank**0.5) for _ in range(case.tasks)]  # B_t transposed
    lead = (case.batch, case.length) if case.per_token else (case.batch,)
    weights = random(*lead, case.tasks).softmax(dim=-1).to(device).requires_grad_()
    scaling = [2.0 - t / case.tasks for t in range(case.tasks)]
    ranks = [case.rank] * (case.tasks - 1)
    old_a, old_b = (
        among_nan(torch.cat([t.detach() for t in parts[:-1]]), case.shift) if old else None for parts in (a, b)
    )

    exact = [t.detach().double().requires_grad_() for t in (x, base, weights, a[-1], b[-1])]
    wide_a, wide_b = ([t.detach().double() for t in parts[:-1]] for parts in (a, b))
    shape = (case.batch, case.length, -1)
    truth = reference.weighted_lora(
        exact[0].view(shape), exact[1].view(shape), [*wide_a, exact[3]], [*(t.mT for t in wide_b), exact[4].mT],
        exact[2], scaling, old_gradient=case.old_gradient,
    )  # fmt: skip
    truths = torch.autograd.grad(truth, exact, dy.detach().double().view(shape))
    with poisoned():
        y = scaled.weighted_lora(
            x.view(shape), base.view(shape), old_a, old_b, a[-1], b[-1], weights, scaling, ranks,
            old_gradient=case.old_gradient, kernel=kernel,
        )  # fmt: skip
        found = torch.autograd.grad(y, (x, base, weights, a[-1], b[-1]), dy.detach().view(shape))
        with torch.no_grad():
            value = scaled.weighted_lora(
                x.view(shape), base.view(shape), old_a, old_b, a[-1], b[-1], weights, scaling,
                ranks, kernel=kernel,
            )  # fmt: skip
    names = ("dx", "dbase", "dw", "dA", "dB")
    result = {"y": relative(y, truth), "y without gradient": relative(value, truth)}
    return result | {name: relative(f, e) for name, f, e in zip(names, found, truths, strict=True)}


def tile_errors(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors of each kernel with each of its tiles, on sizes that no tile divides."""
    from .. import tiles, triton_kernel

    generator = torch.Generator().manual_seed(0)
    groups, length, width, out, old, new = 2, 150, 200, 152, 66, 5
    tokens, rank = groups * length, old + new

    def random(*shape: int) -> Tensor:
        return among_nan(torch.randn(*shape, generator=generator).to(device, dtype))

    x, base, c = random(tokens, width), random(tokens, out), random(tokens, rank)
    p_in = triton_kernel.factor_of(random(old, width), random(new, width))
    p_out = triton_kernel.factor_of(random(old, out), random(new, out))
    scales = torch.rand(groups, rank, generator=generator).to(device)
    wide_in, wide_out = (torch.cat([p.old, p.new]).double() for p in (p_in, p_out))
    spread = scales.double().repeat_interleave(length, dim=0)
    h = x.double() @ wide_in.mT
    found = {}
    for (kernel, size), listed in tiles.TILES.items():
        for tile in listed if size == x.element_size() else ():
            with poisoned():
                if kernel == "shrink":
                    mine, dscale = triton_kernel.shrink(x, p_in, groups, saved=c, tile=tile)
                    wanted = h
                    summed = (h * c.double()).view(groups, length, rank).sum(dim=1)
                    assert dscale is not None
                    found[f"shrink, scales' gradient {tuple(tile)}"] = relative(dscale, summed)
                elif kernel == "expand":
                    mine = triton_kernel.expand(c, scales, p_out, base, dtype, tile=tile)
                    wanted = base.double() + (c.double() * spread) @ wide_out
                else:
                    mine = triton_kernel.block_gradient(c, scales, x, old, new, tile)
                    wanted = ((c.double() * spread)[:, old:]).mT @ x.double()
            found[f"{kernel} {tuple(tile)}"] = relative(mine, wanted)
    return found


def run(kernel: str, device: str, cases: tuple[Case, ...] = SMALL) -> list[dict[str, Any]]:
    """One entry per dtype and case: what was computed, its errors, the tolerance, and whether all are within it."""
    results = []
    for dtype, case in itertools.product(TOLERANCE, (*cases, None) if kernel == "triton" else cases):
        found = tile_errors(dtype, device) if case is None else errors(case, dtype, device, kernel)
        name = "each tile" if case is None else " ".join(f"{k}={v}" for k, v in case._asdict().items())
        most = limit(case, dtype)
        results.append({"dtype": str(dtype).removeprefix("torch."), "case": name, "errors": found, "limit": most,
                        "ok": all(error <= most for error in found.values())})  # fmt: skip
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=("torch", "triton", "reference"))
    parser.add_argument("device", nargs="?", default="cpu")
    given = parser.parse_args()
    print(json.dumps(run(given.kernel, given.device)))
