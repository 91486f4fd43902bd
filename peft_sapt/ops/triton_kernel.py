"""Launches of the Triton kernels: the op's forward and backward on CUDA tensors, or on CPU ones in the interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import kernels, tiles
from .tiles import Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# contraction into fused multiply-adds, stated because Triton's default is about to change
OPTIONS: dict[str, object] = {} if INTERPRETED else {"enable_fp_fusion": True}
TUNED: dict[tuple, Tile] = {}  # by kernel and shape: the fastest tile, timed once in this process


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which in a process with several GPUs may be another than the tensor's."""
    here = not tensor.is_cuda or tensor.device.index == torch.cuda.current_device()
    return nullcontext() if here else torch.cuda.device(tensor.device)


class Factor(NamedTuple):
    """A factor [rank, width] in two tensors of rows."""

    old: Tensor
    new: Tensor
    old_rank: int
    rank: int
    width: int


def factor_of(old: Tensor | None, new: Tensor | None) -> Factor:
    parts = [part.contiguous() for part in (old, new) if part is not None]
    old_rank = 0 if old is None else old.shape[0]
    return Factor(parts[0], parts[-1], old_rank, sum(len(p) for p in parts), parts[0].shape[1])


def shared(factor: Factor, *others: Tensor) -> dict[str, object]:
    """Compile-time settings: whether rows start at 16 bytes, how floats multiply, the interpreter's bfloat16."""
    x = factor.new
    aligned = factor.width * x.element_size() % 16 == 0 and factor.old.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    aligned = aligned and all(t.data_ptr() % 16 == 0 for t in others)
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "ALIGNED": aligned,
        "WIDEN": INTERPRETED and x.dtype == torch.bfloat16,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def pick(kernel: str, x: Tensor, rows: int, rank: int, run: Callable[[Tile], object]) -> Tile:
    """The fastest of the kernel's candidates for such a shape; during graph capture and off CUDA the first one."""
    found = tiles.candidates(kernel, x.element_size(), rows, rank)
    key = (kernel, x.dtype, x.shape[-1], rank, rows.bit_length(), x.device.index)
    if len(found) == 1 or key in TUNED:
        return TUNED.get(key, found[0])
    if INTERPRETED or x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return found[0]
    times = {tile: triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20) for tile in found}
    TUNED[key] = min(times, key=times.__getitem__)
    return TUNED[key]


def shrink(
    x: Tensor,
    factor: Factor,
    groups: int,
    *,
    split: bool = False,
    saved: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h [N, R] (or partial sums [splits, N, R] in float32); with ``saved`` also the scales' gradient [groups, R]."""
    tokens, rank = x.shape[0], factor.rank
    per_row = tokens < groups * tiles.FEW_ROWS
    count, length = (1, tokens) if per_row else (groups, tokens // groups)
    settings = shared(factor, x)

    def run(tile: Tile) -> tuple[Tensor, Tensor | None]:
        row_tiles, rank_tiles = cdiv(length, tile.m), cdiv(rank, tile.r)
        parts = tiles.splits(count * row_tiles * rank_tiles, factor.width, tile.other) if split else 1
        split_width = cdiv(cdiv(factor.width, parts), tile.other) * tile.other
        h = x.new_empty(parts, tokens, rank, dtype=torch.float32 if parts > 1 else x.dtype)
        mode = 0 if saved is None else 2 if per_row else 1
        rows = (0, count * row_tiles, tokens)[mode]
        dscale = torch.empty(rows, rank, device=x.device, dtype=torch.float32)
        kernels.shrink_kernel[(count * row_tiles * rank_tiles, parts)](
            x, factor.old, factor.new, h, h if saved is None else saved, dscale,
            tokens, length, factor.width, factor.old_rank, rank, split_width,
            SCALES=mode, SPLITS=parts, **settings, BLOCK_M=tile.m, BLOCK_R=tile.r, BLOCK_K=tile.other,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
        return (h if parts > 1 else h[0]), (dscale.view(groups, -1, rank).sum(dim=1) if mode else None)

    return run(tile or pick("shrink", x, length, rank, run))


def expand(
    h: Tensor,
    scales: Tensor,
    factor: Factor,
    base: Tensor | None,
    dtype: torch.dtype,
    *,
    first: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """``base + (h * g) P`` [N, O] over the ranks from ``first`` on; h [N, R] or partial sums [splits, N, R]."""
    parts, tokens, groups = (h.shape[0] if h.dim() == 3 else 1), h.shape[-2], scales.shape[0]
    per_row = tokens < groups * tiles.FEW_ROWS
    count, length = (1, tokens) if per_row else (groups, tokens // groups)
    settings = shared(factor)

    def run(tile: Tile) -> Tensor:
        y = torch.empty(tokens, factor.width, device=h.device, dtype=dtype)
        grid = (count * cdiv(length, tile.m), cdiv(factor.width, tile.other))
        kernels.expand_kernel[grid](
            h, scales, factor.old, factor.new, y if base is None else base, y,
            tokens, length, tokens // groups if groups else 1, factor.width, factor.old_rank, factor.rank, first,
            SPLITS=parts, PER_ROW=per_row, HAS_BASE=base is not None, **settings,
            BLOCK_M=tile.m, BLOCK_R=tile.r, BLOCK_N=tile.other,
            num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
        return y

    return run(tile or pick("expand", factor.new, length, factor.rank, run))


def block_gradient(c: Tensor, scales: Tensor, x: Tensor, first: int, count: int, tile: Tile | None = None) -> Tensor:
    """``(c * g)^T x`` over ``count`` columns of c [N, R] from ``first`` on; x [N, D] -> [count, D]."""
    tokens, width = x.shape
    tile = tile or tiles.candidates("block_gradient", x.element_size(), tokens, count)[0]
    grid = (cdiv(width, tile.other), cdiv(count, tile.r))
    parts = tiles.splits(grid[0] * grid[1], tokens, tile.m)
    split_tokens = cdiv(cdiv(tokens, parts), tile.m) * tile.m
    out = torch.empty(parts, count, width, device=x.device, dtype=torch.float32)
    kernels.block_gradient_kernel[(*grid, parts)](
        c, scales, x, out, tokens, tokens // scales.shape[0], width, c.shape[1], first, count, split_tokens,
        **shared(Factor(x, x, 0, count, width)), BLOCK_M=tile.m, BLOCK_R=tile.r, BLOCK_N=tile.other,
        num_warps=tile.warps, num_stages=tile.stages, **OPTIONS,
    )  # fmt: skip
    return out.sum(dim=0).to(x.dtype)


def forward(
    x: Tensor, base: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None, new_b: Tensor | None,
    scales: Tensor, split: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [N, O] and h [N, R]; with ``split`` the width may be cut, and h is then of no use to a backward."""
    x, base, scales = x.contiguous(), base.contiguous(), scales.float().contiguous()
    if x.shape[0] == 0:
        return base.clone(), x.new_empty(0, scales.shape[1])
    with on_device_of(x):
        h, _ = shrink(x, factor_of(old_a, new_a), scales.shape[0], split=split)
        return expand(h, scales, factor_of(old_b, new_b), base, base.dtype), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None,
    new_b: Tensor | None, scales: Tensor, old_gradient: bool, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """The same kernels with the factors swapped; see [`peft_sapt.ops.torch_kernel.backward`] for the formulas."""
    need_x, need_old_a, need_old_b, need_new_a, need_new_b, need_scales = needs
    found: list[Tensor | None] = [None] * len(needs)
    if x.shape[0] == 0:
        like = (x, old_a, old_b, new_a, new_b, scales)
        return [torch.zeros_like(t) if n and t is not None else None for t, n in zip(like, needs, strict=True)]
    dy, x, h, table = dy.to(x.dtype).contiguous(), x.contiguous(), h.contiguous(), scales.float().contiguous()
    factor_in, factor_out = factor_of(old_a, new_a), factor_of(old_b, new_b)
    old, rank = factor_in.old_rank, factor_in.rank
    with on_device_of(x):
        if need_x or need_old_a or need_new_a or need_scales:
            g, d_scales = shrink(dy, factor_out, len(table), saved=h if need_scales else None)  # [N, R], [G, R]
            found[5] = None if d_scales is None else d_scales.to(scales.dtype)
            if need_x:
                found[0] = expand(g, table, factor_in, None, x.dtype, first=0 if old_gradient else old)
            if need_old_a:
                found[1] = block_gradient(g, table, x, 0, old)
            if need_new_a:
                found[3] = block_gradient(g, table, x, old, rank - old)
        if need_old_b:
            found[2] = block_gradient(h, table, dy, 0, old)
        if need_new_b:
            found[4] = block_gradient(h, table, dy, old, rank - old)
    return found
