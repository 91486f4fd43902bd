"""Warnings about a query that is not what its caller believes, said once for each base model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

FRAMES = 40  # callers that are looked at for labels
IGNORED_LABEL = -100
ANSWER_IN_QUERY = (
    "{what} without labels in the model call (label smoothing, compute_loss_func, a loss of your own): the whole row "
    "counts as prompt, answer included. Mark the prompt with sapt_prompt_mask=[B, S], as PromptMaskCollator does, or "
    "pass the labels."
)
PADDED = (
    "Some rows end in a run of token {token} that looks like padding, and there is no attention_mask: it counts as "
    "prompt, so that a row's weights depend on how long the other rows are. Pass attention_mask=[B, S]; to score "
    "answers, also sapt_weights=model.attention_weights(...) of the contexts alone."
)
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(base: nn.Module, message: str, stacklevel: int = 3) -> None:
    """Warn of ``message`` the first time that it comes up with ``base``."""
    said = _said.setdefault(base, set())
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=stacklevel + 1)


def labels_left_out(input_ids: Tensor) -> bool:
    """Whether a caller has labels for these very rows [B, S], which it keeps from the model.

    They are looked for by name among the callers' variables, and by what they hold: -100, or the row's own tokens.
    """
    return any(_are_labels_of(input_ids, found) for found in _labels_of_callers())


def _labels_of_callers() -> Iterator[Any]:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(FRAMES):
        if frame is None:
            return
        variables = frame.f_locals
        yield variables.get("labels")
        for value in list(variables.values()):
            if isinstance(value, Mapping) or type(value).__name__ == "BatchEncoding":
                yield value.get("labels")
        frame = frame.f_back


def _are_labels_of(input_ids: Tensor, found: Any) -> bool:
    if not isinstance(found, Tensor) or found.shape != input_ids.shape or found.is_floating_point():
        return False
    found = found.to(input_ids.device)
    supervised = found != IGNORED_LABEL
    return bool(supervised.any()) and bool((found[supervised] == input_ids[supervised]).all())


def padding_token(input_ids: Tensor) -> int | None:
    """The token that seems to pad rows [B, S] at their end: some rows end in a run of it, and others do not."""
    if input_ids.shape[0] < 2 or input_ids.shape[1] < 3:
        return None
    runs = (input_ids[:, -1] == input_ids[:, -2]) & ~(input_ids == input_ids[:, -1:]).all(dim=1)
    if not bool(runs.any()) or bool(runs.all()):
        return None
    tokens = input_ids[runs, -1]
    token = int(tokens[0])
    return token if bool((tokens == token).all()) and not bool((input_ids[~runs, -1] == token).any()) else None
