"""Warnings about a query that is not what its caller believes, said once for each base model."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

FRAMES = 40  # callers that are looked at for labels
NAMES = {"labels", "batch", "inputs", "features", "examples", "sample", "model_inputs", "encoded", "data"}  # of theirs
IGNORED_LABEL = -100
LONG_RUN = 4  # of one token at the end of a row, which no text has
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
        code = frame.f_code
        if not NAMES.isdisjoint(code.co_varnames if code.co_flags & CO_OPTIMIZED else frame.f_globals):
            yield from _labels_in(frame)
        frame = frame.f_back


def _labels_in(frame: FrameType) -> list[Any]:
    variables = frame.f_locals
    found = [variables.get("labels")]
    for name in NAMES:
        value = variables.get(name)
        held = getattr(value, "data", value)  # a BatchEncoding's own dict
        if isinstance(held, dict):
            found.append(dict.get(held, "labels"))
    if frame.f_code.co_flags & CO_OPTIMIZED and type(variables) is dict:
        variables.clear()  # before Python 3.13 it is a copy, which would keep alive what the caller deletes
    return found


def a_caller_trains() -> bool:
    """Whether a module whose ``forward`` is under way, around the pool's own, has something that trains."""
    frame: FrameType | None = sys._getframe(1)
    for _ in range(FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_name == "forward" and frame.f_code.co_flags & CO_OPTIMIZED:
            variables = frame.f_locals
            module = variables.get("self")
            if type(variables) is dict:
                variables.clear()
            if isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters()):
                return True
        frame = frame.f_back
    return False


def _are_labels_of(input_ids: Tensor, found: Any) -> bool:
    if not isinstance(found, Tensor) or found.shape != input_ids.shape or found.is_floating_point():
        return False
    found = found.to(input_ids.device)
    supervised = found != IGNORED_LABEL
    return bool(supervised.any()) and bool((found[supervised] == input_ids[supervised]).all())


def padding_token(input_ids: Tensor, usual: set[int]) -> int | None:
    """The token that seems to pad rows [B, S] at their end: some rows end in a run of it, and others do not.

    A run of two will do for a token that is ``usual`` as padding; one of another token has to be longer.
    """
    if input_ids.shape[0] < 2 or input_ids.shape[1] < LONG_RUN:
        return None
    last = input_ids[:, -1:]
    runs = (input_ids.flip(1) == last).long().cumprod(dim=1).sum(dim=1)  # [B], how long the last token has stood
    tokens = {int(token) for token in last[runs > 1]}
    if len(tokens) != 1:
        return None
    token = tokens.pop()
    ends = last[:, 0] == token
    padded = bool((runs[ends] > 1).all()) and int(runs[ends].max()) >= (2 if token in usual else LONG_RUN)
    return token if padded and not bool(ends.all()) else None
