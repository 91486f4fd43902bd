"""How much the output of a layer can move when blocks are left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def block_norms(blocks_a: Sequence[Tensor], blocks_b: Sequence[Tensor]) -> Tensor:
    """Spectral norms ``||B_t A_t||`` [T] of blocks A_t [r, D] and B_t transposed, [r, O], in float64.

    The product is never formed: with A^T = Q_a R_a and B^T transposed = Q_b R_b its norm is that of R_b R_a^T [r, r].
    """
    norms = []
    for a, b in zip(blocks_a, blocks_b, strict=True):
        cores = [torch.linalg.qr(factor.detach().double().mT, mode="r").R for factor in (a, b)]
        norms.append(torch.linalg.matrix_norm(cores[1] @ cores[0].mT, ord=2))
    return torch.stack(norms)


def dropped_bound(weights: Tensor, dropped: Tensor, norms: Tensor, scaling: Sequence[float]) -> float:
    """``sum of w_t * s_t * ||B_t A_t||`` over the dropped blocks: ``||change of y|| <= bound * ||x||`` for each token.

    Args:
        weights: [T]. dropped: [T], bool. norms: [T], from [`block_norms`]. scaling: lora_alpha / r of each task.
    """
    scale = torch.tensor(scaling, dtype=norms.dtype, device=norms.device)
    return float((weights.to(norms) * scale * norms)[dropped.to(norms.device)].sum())
