"""The Triton kernels: shrink, expand, and the gradient of a block. Their shapes and launches are in triton_kernel.py.

Both factors of a pool are stacks of rows, [R, D] and [R, O], in two tensors: frozen rows and rows of the newest block.
The kernels see one rank axis over both, and pick each row's address, so that nothing is concatenated.
``WIDEN`` is for the interpreter alone, whose dot product would take the bits of bfloat16 for numbers.
"""

import triton
import triton.language as tl


@triton.jit
def factor_rows(old_ptr, new_ptr, rank_index, old_rank, width, ALIGNED: tl.constexpr):
    """Addresses of the rows ``rank_index`` of a factor that lies in two tensors."""
    r = rank_index.to(tl.int64)
    rows = tl.where(r < old_rank, old_ptr + r * width, new_ptr + (r - old_rank) * width)
    if ALIGNED:  # a promise that the launch has checked: 16-byte loads
        rows = tl.multiple_of(rows, 16)
    return rows


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b`` in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def shrink_kernel(
    x_ptr, old_ptr, new_ptr, h_ptr, saved_ptr, dscale_ptr,
    tokens, length, width, old_rank, rank, split_width,
    SCALES: tl.constexpr, SPLITS: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = x P^T; x [tokens, width], P [rank, width]. Rows are tiled within groups of ``length`` tokens.

    SCALES: 0, h alone; 1, also the sum of h * saved over each tile, dscale [tiles, rank]; 2, h * saved [tokens, rank].
    With SPLITS > 1 the width is cut, and h is [SPLITS, tokens, rank] of partial sums in float32.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    rank_tiles = tl.cdiv(rank, BLOCK_R)
    tile = tl.program_id(0) // rank_tiles  # the tiles of a row of x run side by side, so that L2 serves all but one
    begin = (tile % tiles) * BLOCK_M
    row = (tile // tiles).to(tl.int64) * length + begin  # 64 bits once per tile; inside it 32 suffice
    m = tl.arange(0, BLOCK_M)
    real = m < length - begin
    r = (tl.program_id(0) % rank_tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = real[:, None] & (r < rank)[None, :]
    x_rows = x_ptr + row * width + m * width
    if ALIGNED:
        x_rows = tl.multiple_of(x_rows, 16)
    p_rows = factor_rows(old_ptr, new_ptr, tl.where(r < rank, r, 0), old_rank, width, ALIGNED)
    first = tl.program_id(1) * split_width
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, split_width, BLOCK_K):
        k = first + start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows[:, None] + k[None, :], mask=real[:, None] & (k < width)[None, :], other=0.0)
        p = tl.load(p_rows[:, None] + k[None, :], mask=(r < rank)[:, None] & (k < width)[None, :], other=0.0)
        acc = product(x, tl.trans(p), acc, WIDEN, PRECISION)
    at = m[:, None] * rank + r[None, :]
    h_tile = h_ptr + row * rank
    if SPLITS > 1:
        h_tile += tl.program_id(1).to(tl.int64) * tokens * rank
    tl.store(h_tile + at, acc.to(h_ptr.dtype.element_ty), mask=inside)
    if SCALES > 0:
        gradient = acc * tl.load(saved_ptr + row * rank + at, mask=inside, other=0.0).to(tl.float32)
        if SCALES == 1:
            tl.store(dscale_ptr + tile.to(tl.int64) * rank + r, tl.sum(gradient, axis=0), mask=r < rank)
        else:
            tl.store(dscale_ptr + row * rank + at, gradient, mask=inside)


@triton.jit(do_not_specialize=["tokens"])  # a lone token's count would come as a constant, which cannot be widened
def expand_kernel(
    h_ptr, scale_ptr, old_ptr, new_ptr, base_ptr, y_ptr,
    tokens, length, span, width, old_rank, rank, first,
    SPLITS: tl.constexpr, PER_ROW: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = base + (h * g) P over the ranks from ``first`` on; h [SPLITS, tokens, rank], P [rank, width].

    The scales [groups, rank] are those of the tile's group, or with PER_ROW those of row // span.
    """
    tiles = tl.cdiv(length, BLOCK_M)
    tile = tl.program_id(0)
    begin = (tile % tiles) * BLOCK_M
    group = (tile // tiles).to(tl.int64)
    row = group * length + begin
    m = tl.arange(0, BLOCK_M)
    real = m < length - begin
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = real[:, None] & (n < width)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        known = real[:, None] & (r < rank)[None, :]
        h_at = h_ptr + row * rank + (m[:, None] * rank + r[None, :])
        h = tl.load(h_at, mask=known, other=0.0).to(tl.float32)
        for s in tl.static_range(1, SPLITS):
            h += tl.load(h_at + s * tokens.to(tl.int64) * rank, mask=known, other=0.0)
        if PER_ROW:
            h *= tl.load(scale_ptr + ((row + m) // span)[:, None] * rank + r[None, :], mask=known, other=0.0)
        else:
            h *= tl.load(scale_ptr + group * rank + r, mask=r < rank, other=0.0)[None, :]
        p_rows = factor_rows(old_ptr, new_ptr, tl.where(r < rank, r, 0), old_rank, width, ALIGNED)
        p = tl.load(p_rows[:, None] + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        acc = product(h.to(p.dtype), p, acc, WIDEN, PRECISION)
    at = m[:, None] * width + n[None, :]
    if HAS_BASE:
        acc += tl.load(base_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def block_gradient_kernel(
    c_ptr, scale_ptr, x_ptr, out_ptr,
    tokens, span, width, rank, first, count, split_tokens,
    ALIGNED: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = (c * g)^T x over the columns first .. first + count of c [tokens, rank]; x [tokens, width].

    The tokens are cut into parts of ``split_tokens``, and out is [parts, count, width] of partial sums in float32.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.program_id(2) * split_tokens
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for start in range(0, split_tokens, BLOCK_M):
        m = (begin + start + tl.arange(0, BLOCK_M)).to(tl.int64)
        known = (r < count)[:, None] & (m < tokens)[None, :]
        column = first + r[:, None]
        c = tl.load(c_ptr + m[None, :] * rank + column, mask=known, other=0.0).to(tl.float32)
        c *= tl.load(scale_ptr + (m // span)[None, :] * rank + column, mask=known, other=0.0)
        x_rows = x_ptr + m * width
        if ALIGNED:
            x_rows = tl.multiple_of(x_rows, 16)
        x = tl.load(x_rows[:, None] + n[None, :], mask=(m < tokens)[:, None] & (n < width)[None, :], other=0.0)
        acc = product(c.to(x.dtype), x, acc, WIDEN, PRECISION)
    out = out_ptr + tl.program_id(2).to(tl.int64) * count * width
    tl.store(out + r[:, None] * width + n[None, :], acc, mask=(r < count)[:, None] & (n < width)[None, :])
