"""Gates: the weight of each block times its scaling, spread over the block's ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rank_gates(weights: Tensor, scaling: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """Spread ``w_t * s_t`` over the ranks of each block: [..., T] -> [..., R] with R = sum of ``ranks``.

    One call serves all layers of a forward, since every layer of a pool has the same ranks.
    """
    gates = weights * torch.tensor(scaling, dtype=weights.dtype, device=weights.device)
    if len(set(ranks)) == 1:
        return gates.unsqueeze(-1).expand(*gates.shape, ranks[0]).flatten(-2)
    return gates.repeat_interleave(torch.tensor(ranks, device=gates.device), dim=-1, output_size=sum(ranks))
