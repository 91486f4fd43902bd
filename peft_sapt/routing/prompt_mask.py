"""Which tokens of a batch are the prompt: the attended ones before the first supervised label, never an answer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PromptError

IGNORED_LABEL = -100


def inferred_mask(input_ids: Tensor, pad_token_id: int | None, eos_token_id: int | list[int] | None) -> Tensor:
    """The attention mask that ``generate`` would infer where none is given: [B, S], bool.

    Padding is recognised by its token, unless that token also ends a text; then everything counts as attended.
    """
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
    if pad_token_id is None or pad_token_id in eos:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return input_ids != pad_token_id


def before_labels(mask: Tensor, labels: Tensor) -> Tensor:
    """``mask`` [B, S] cut before the first supervised label of each row; ``labels`` [B, S] holds -100 elsewhere.

    Raises:
        PromptError: a row has supervised labels, but no attended token before the first one.
    """
    supervised = labels != IGNORED_LABEL
    prompt = mask & (supervised.cumsum(dim=1) == 0)
    empty = supervised.any(dim=1) & ~prompt.any(dim=1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise PromptError(
            f"Rows {rows} have labels but no prompt token before them, so there is nothing to compute their attention "
            "from. Set the labels of prompt tokens to -100, or mark the prompt with sapt_prompt_mask=[B, S], as "
            "PromptMaskCollator does from a column of the rows (with remove_unused_columns=False)."
        )
    return prompt


def check_rows(mask: Tensor, training: bool) -> None:
    """Refuse an empty batch, and in training a row without any prompt token.

    In inference a row of nothing but padding is let through: its weights are uniform.
    """
    if mask.shape[1] == 0 or mask.shape[0] == 0:
        raise PromptError(f"The prompt is empty: input of shape {list(mask.shape)}. Give at least one token per row.")
    empty = ~mask.any(dim=1)
    if training and bool(empty.any()):
        raise PromptError(
            f"Rows {empty.nonzero().flatten().tolist()} have no prompt token (all padding, or masked out). "
            "Drop them from the training data."
        )
