"""A weighted sum of low-rank products, cut back to low rank."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_sum(a: Tensor, b: Tensor, gains: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the matrix of ``rank`` that is nearest to sum_j gains_j b_j a_j^T (Eckart and Young).

    No matrix of the size of the layer is built: QR of both factors leaves a problem of their common rank.

    Args:
        a: [R, in]. b: [R, out]. gains: [R].

    Returns:
        A [rank, in] and B [rank, out] in float32 with A's rows of equal share with B's (A_i and B_i have one norm);
        rows beyond what the sum has in it are zero.
    """
    q_in, r_in = torch.linalg.qr(a.double().mT)  # [in, R] · [R, R]
    q_out, r_out = torch.linalg.qr((gains.double().unsqueeze(1) * b.double()).mT)
    u, s, vh = torch.linalg.svd(r_out @ r_in.mT)  # of the sum in these bases
    kept = min(rank, len(s))
    root = s[:kept].sqrt().unsqueeze(1)
    new_a = torch.zeros(rank, a.shape[1], dtype=torch.float64, device=a.device)
    new_b = torch.zeros(rank, b.shape[1], dtype=torch.float64, device=b.device)
    new_a[:kept] = root * (q_in @ vh[:kept].mT).mT
    new_b[:kept] = root * (q_out @ u[:, :kept]).mT
    return new_a.float(), new_b.float()
