"""Packed rows: several samples in one row, each of which needs attention weights of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PromptError
from .caches import past_of
from .notices import IGNORED_LABEL


def segments_of(inputs: dict[str, Any]) -> Tensor | None:
    """Number of the sample that each token belongs to, counted through the batch: [B, S]; None if rows are not packed.

    Packed are batches with ``seq_idx`` [B, S], with ``cu_seq_lens_q`` (one row, padding-free), or whose
    ``position_ids`` [B, S] fall back within a row that has no mask and continues no cache, as transformers has it.
    With a mask or a cache, positions are somebody's own, of one prompt that may share or repeat some.
    """
    shape = next((inputs[n].shape[:2] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None)
    if shape is None:
        return None
    starts = _starts(inputs, shape)
    if starts is None or not bool(starts[:, 1:].any()):
        return None
    starts[:, 0] = True
    return starts.flatten().cumsum(0).sub(1).view(shape)


def _starts(inputs: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """True where a new sample begins within a row, [B, S]; None if nothing tells."""
    numbers, ends, positions = (inputs.get(n) for n in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    if isinstance(numbers, Tensor) and numbers.shape == shape:
        return torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))
    if isinstance(ends, Tensor) and shape[0] == 1:
        starts = torch.zeros(shape, dtype=torch.bool, device=ends.device)
        starts[0, ends[(ends > 0) & (ends < shape[1])].long()] = True
        return starts
    if isinstance(positions, Tensor) and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # of text, before those in time, height and width
    if not isinstance(positions, Tensor) or positions.shape != shape or shape[1] < 2:
        return None
    if inputs.get("attention_mask") is not None or past_of(inputs) is not None:
        return None
    before, after = positions[:, :-1], positions[:, 1:]
    falls = after < before
    # among samples, one of a single token is followed by another that begins at the same position
    again = (after == before) & (after == positions.amin(dim=1, keepdim=True)) & falls.any(dim=1, keepdim=True)
    return torch.nn.functional.pad(falls | again, (1, 0))


def without_tail(mask: Tensor, segments: Tensor, labelled: bool) -> Tensor:
    """``mask`` without the pads at the end of packed rows, which restart ``position_ids`` one by one.

    Where padding is no token of its own, nothing else marks it. A last sample of one token cannot be supervised, so
    with labels it is padding too; without labels only a run of two or more is.
    """
    flat = segments.flatten()
    single = (torch.bincount(flat)[flat] == 1).view_as(mask)  # [B, S]
    tail = single.flip(1).long().cumprod(dim=1).flip(1).bool()
    long_enough = tail.sum(dim=1, keepdim=True) >= (1 if labelled else 2)
    return mask & ~(tail & long_enough)


def require_prompts(mask: Tensor, labels: Tensor, segments: Tensor) -> None:
    """Raises [`PromptError`] if a packed sample has supervised labels but no token in ``mask``."""
    flat, count = segments.flatten(), int(segments.max()) + 1
    tokens = torch.zeros(count, dtype=torch.long, device=flat.device)
    answers = torch.zeros_like(tokens)
    tokens.index_add_(0, flat, mask.flatten().long())
    answers.index_add_(0, flat, (labels != IGNORED_LABEL).flatten().long())
    empty = ((tokens == 0) & (answers > 0)).nonzero().flatten().tolist()
    if empty:
        raise PromptError(
            f"Packed samples {empty[:10]} (counted through the batch) have labels but no prompt token. Mark their "
            "prompts in sapt_prompt_mask, or drop them from the training data."
        )


def rows_of_segments(mask: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Of each of the M tokens in ``mask`` [B, S]: its prompt, its place among that prompt's tokens, [M] each; and the
    number of prompts, which are the ``segments`` [B, S] or else the rows."""
    if segments is None:
        segments = torch.arange(len(mask), device=mask.device).unsqueeze(1).expand_as(mask)
    rows, count = segments[mask], int(segments.max()) + 1
    lengths = torch.bincount(rows, minlength=count)
    starts = lengths.cumsum(0) - lengths  # the tokens of a prompt follow one another
    return rows, torch.arange(len(rows), device=mask.device) - starts[rows], count


def max_pool_segments(embeddings: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Element-wise max over the prompt positions of each segment: [B, S, d] -> [N, d], float32; NaN where none."""
    count, width = int(segments.max()) + 1, embeddings.shape[-1]
    flat, keep = segments.flatten(), mask.flatten()
    rows = embeddings.float().reshape(-1, width)[keep]  # [M, d]
    pooled = torch.full((count, width), -torch.inf, device=rows.device)
    pooled = pooled.scatter_reduce(0, flat[keep].unsqueeze(-1).expand(-1, width), rows, "amax")
    return pooled.masked_fill(pooled[:, :1].isinf(), torch.nan)


def mean_pool_segments(embeddings: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Mean over the prompt positions of each segment: [B, S, d] -> [N, d], float32; NaN where none."""
    count, width = int(segments.max()) + 1, embeddings.shape[-1]
    flat, keep = segments.flatten(), mask.flatten()
    rows = embeddings.float().reshape(-1, width)[keep]  # [M, d]
    summed = torch.zeros(count, width, device=rows.device).index_add(0, flat[keep], rows)
    return summed / torch.bincount(flat[keep], minlength=count).unsqueeze(-1)
