"""Weighted LoRA aggregation in rank space: two shrinks, one gate per rank, two expands, no [T, B, S, O] tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_gates(weights: Tensor, scaling: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """Spread ``w_t * s_t`` over the ranks of each block: [..., T] -> [..., R] with R = sum of ``ranks``.

    One call serves all layers of a forward, since every layer of a pool has the same ranks.
    """
    gates = weights * torch.tensor(scaling, dtype=weights.dtype, device=weights.device)
    if len(set(ranks)) == 1:
        return gates.unsqueeze(-1).expand(*gates.shape, ranks[0]).flatten(-2)
    return gates.repeat_interleave(torch.tensor(ranks, device=gates.device), dim=-1, output_size=sum(ranks))


def gated_lora(
    x: Tensor,
    base: Tensor,
    old_a: Tensor | None,
    old_b: Tensor | None,
    new_a: Tensor,
    new_b: Tensor,
    gates: Tensor,
    *,
    old_gradient: bool = True,
    new_x: Tensor | None = None,
) -> Tensor:
    """``base + (x A^T * g) B^T`` with the frozen blocks stacked along the rank axis and the newest block apart.

    Args:
        x: [B, S, D] or [B, D].
        base: [B, S, O] or [B, O].
        old_a, old_b: frozen blocks, [R_old, D] and [O, R_old]; None in a pool of one task.
        new_a, new_b: the newest block, [r, D] and [O, r].
        gates: from [`rank_gates`], [B, R_old + r] or [B, S, R_old + r].
        old_gradient: False cuts the gradient through the frozen blocks into ``x``.
        new_x: input of the newest block where it differs from ``x`` (dropout).
    """
    if gates.dim() == x.dim() - 1:
        gates = gates.unsqueeze(1)  # [B, R] -> [B, 1, R]
    old_rank = 0 if old_a is None else old_a.shape[0]
    y = base
    if old_a is not None and old_b is not None:
        h = F.linear(x if old_gradient else x.detach(), old_a)  # [B, S, R_old]
        y = y + F.linear(h * gates[..., :old_rank].to(h.dtype), old_b)
    h = F.linear(x if new_x is None else new_x, new_a)  # [B, S, r]
    return y + F.linear(h * gates[..., old_rank:].to(h.dtype), new_b)


def weighted_lora(
    x: Tensor,
    base: Tensor,
    old_a: Tensor | None,
    old_b: Tensor | None,
    new_a: Tensor,
    new_b: Tensor,
    weights: Tensor,
    scaling: Sequence[float],
    old_ranks: Sequence[int] = (),
    *,
    old_gradient: bool = True,
) -> Tensor:
    """``base + sum_t w_t * s_t * B_t A_t x`` (SAPT, section 3.2), in rank space.

    The same value and gradients as [`peft_sapt.ops.reference.weighted_lora`], without its [T, B, S, O] intermediates:
    saved for the backward are ``x`` and the rank-sized activations.

    Args:
        x: input of the frozen layer, [B, S, D] or [B, D]; the factors share its dtype.
        base: output of the frozen layer, [B, S, O] or [B, O].
        old_a, old_b: frozen blocks stacked along the rank axis, oldest first, [R_old, D] and [O, R_old], or None.
        new_a, new_b: the block of the newest task, [r, D] and [O, r].
        weights: attention weights, [B, T], or [B, S, T] per token; best in float32.
        scaling: lora_alpha / r of each of the T tasks.
        old_ranks: ranks of the T - 1 frozen blocks, with sum R_old.
        old_gradient: False cuts the gradient through the frozen blocks into ``x``, as the release does.

    Raises:
        ValueError: ranks, scaling and weights disagree about T, or the batch of ``weights`` is not that of ``x``.
    """
    ranks = [*old_ranks, new_a.shape[0]]
    stacked = 0 if old_a is None else old_a.shape[0]
    if sum(old_ranks) != stacked:
        raise ValueError(f"old_ranks {list(old_ranks)} add up to {sum(old_ranks)}, but old_a has {stacked} rows.")
    if not len(ranks) == len(scaling) == weights.shape[-1]:
        raise ValueError(
            f"{len(ranks)} blocks, {len(scaling)} scalings and {weights.shape[-1]} weights per row: give one of each "
            "per task."
        )
    if weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights are for {weights.shape[0]} rows, x has {x.shape[0]}: give one weight row per input."
        )
    gates = rank_gates(weights, scaling, ranks)
    return gated_lora(x, base, old_a, old_b, new_a, new_b, gates, old_gradient=old_gradient)
