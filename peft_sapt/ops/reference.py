"""The definition of weighted LoRA aggregation, slow and plain; tests and benchmarks compare with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_lora(
    x: Tensor,
    base: Tensor,
    blocks_a: Sequence[Tensor],
    blocks_b: Sequence[Tensor],
    weights: Tensor,
    scaling: Sequence[float],
    *,
    newest: int | None = None,
    old_gradient: bool = True,
) -> Tensor:
    """``base + sum_t w_t * s_t * B_t A_t x``, one task after another (SAPT, section 3.2).

    Args:
        x: input of the frozen layer, [B, S, D] or [B, D].
        base: its output, [B, S, O] or [B, O].
        blocks_a: A_t [r_t, D], oldest task first; the last one is the block that trains.
        blocks_b: B_t [O, r_t].
        weights: attention weights, [B, T], or [B, S, T] with one weight vector per token.
        scaling: lora_alpha / r of each task.
        newest: index of the first block that is not old; by default that of the last.
        old_gradient: False cuts the gradient that flows through the old blocks into ``x``, as the official code does.
    """
    while weights.dim() < x.dim():
        weights = weights.unsqueeze(-2)  # [B, T] -> [B, 1, T], the same for all tokens of a row
    y = base
    newest = len(blocks_a) - 1 if newest is None else newest
    for t, (a, b) in enumerate(zip(blocks_a, blocks_b, strict=True)):
        x_t = x if t >= newest or old_gradient else x.detach()
        delta = (x_t @ a.T) @ b.T  # [B, S, O]
        y = y + weights[..., t : t + 1].to(torch.promote_types(weights.dtype, delta.dtype)) * scaling[t] * delta
    return y
