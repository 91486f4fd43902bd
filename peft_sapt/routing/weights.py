"""Attention weights by hand: given by name or as numbers, repeated for beams, cut to those that matter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import TaskError, WeightsError


def spread(weights: Tensor, batch: int, what: str) -> Tensor:
    """Repeat each row for its beams or return sequences, in the order in which ``generate`` expands its inputs.

    One mixture that all rows share serves any number of them.
    """
    rows = weights.shape[0]
    if rows == batch:
        return weights
    if batch % rows:
        if bool((weights == weights[:1]).all()):
            return weights[:1].expand(batch, *weights.shape[1:])
        raise WeightsError(f"{what} has attention weights for {rows} rows, this forward has {batch}.")
    return weights.repeat_interleave(batch // rows, dim=0)


def one_hot(names: str | list[str], tasks: list[str], batch: int, device: torch.device) -> Tensor:
    """Weights [B, T] that pick one task, the same for all rows or one per row."""
    wanted = [names] * batch if isinstance(names, str) else list(names)
    unknown = sorted({str(n) for n in wanted if n not in tasks})
    if unknown:
        raise TaskError(f"sapt_task names {unknown}, which the pool does not hold. Its tasks are {tasks}.")
    if len(wanted) != batch:
        raise WeightsError(f"sapt_task has {len(wanted)} names for {batch} rows: give one name, or one per row.")
    index = torch.tensor([tasks.index(n) for n in wanted], device=device)
    return nn.functional.one_hot(index, len(tasks)).float()


def check_weights(weights: Tensor, tasks: list[str], batch: int, device: torch.device) -> Tensor:
    """Weights of the caller as [B, T] in float32; one row stands for all."""
    if not isinstance(weights, Tensor):
        weights = torch.tensor(weights, dtype=torch.float32)
    if weights.dim() == 1:
        weights = weights.unsqueeze(0)
    if weights.dim() != 2 or weights.shape[1] != len(tasks):
        raise WeightsError(
            f"sapt_weights has shape {list(weights.shape)}, expected [{batch}, {len(tasks)}]: one weight per task and "
            f"row, in the order of model.tasks {tasks}."
        )
    if not bool(torch.isfinite(weights).all()):
        raise WeightsError("sapt_weights holds NaN or infinity.")
    weights = weights.to(device=device, dtype=torch.float32)
    return spread(weights, batch, "sapt_weights")


def select(weights: Tensor, top_k: int | None, min_weight: float, renormalize: bool = False) -> Tensor:
    """Weights [..., T] with zero in place of all but the ``top_k`` largest of a row and of those below ``min_weight``.

    The rest keep their values, so that the output moves by at most sum of dropped w_t * s_t * ||B_t A_t|| * ||x|| in
    each layer; or with ``renormalize`` they are scaled to the sum that all had. The largest weight of a row stays.
    """
    kept = weights
    if top_k is not None and top_k < weights.shape[-1]:
        leading = weights.topk(top_k, dim=-1)
        kept = torch.zeros_like(weights).scatter(-1, leading.indices, leading.values)
    if min_weight > 0:
        bound = weights.amax(dim=-1, keepdim=True).clamp(max=min_weight)
        kept = kept.masked_fill(weights < bound, 0.0)
    if renormalize and kept is not weights:
        kept = kept * (weights.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True)).nan_to_num(0.0)
    return kept
