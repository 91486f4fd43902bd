"""Rank scales: the weight of each block times its scaling, spread over the block's ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FEW_KINDS = 16  # runs of alike blocks up to which a product of each is less than a copy from the host


def rank_scales(weights: Tensor, scaling: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """Spread ``w_t * s_t`` over the ranks of each block: [..., T] -> [..., R] with R = sum of ``ranks``.

    One call serves all layers of a forward, since every layer of a pool has the same ranks. Blocks of the same scaling
    and rank beside each other are taken together, so that in a usual pool nothing is copied from the host, for which a
    GPU would have to wait, and which a CUDA graph cannot hold.
    """
    kinds: list[list[Any]] = []  # scaling, rank, number of blocks
    for alike, rank in zip(scaling, ranks, strict=True):
        if kinds and kinds[-1][:2] == [alike, rank]:
            kinds[-1][2] += 1
        else:
            kinds.append([alike, rank, 1])
    if len(kinds) <= FEW_KINDS:
        parts = weights.split([kind[2] for kind in kinds], dim=-1)
        spread = [
            (part * alike).unsqueeze(-1).expand(*part.shape, rank).flatten(-2)
            for part, (alike, rank, _) in zip(parts, kinds, strict=True)
        ]
        return spread[0] if len(spread) == 1 else torch.cat(spread, dim=-1)
    scales = weights * torch.tensor(scaling, dtype=weights.dtype, device=weights.device)
    return scales.repeat_interleave(torch.tensor(ranks, device=scales.device), dim=-1, output_size=sum(ranks))
