"""Gradient checkpointing: the rank scales of a forward become an input of each checkpointed segment.

transformers reruns a layer's ``forward`` in the backward pass, when the model's own forward is long over and perhaps
another one has run since; on CUDA it does so in another thread. What the layers would read from a shared place then is
gone or foreign. As an explicit argument the rank scales are kept by autograd with the segment, and take their gradient
through it, reentrant or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

HOOK = "_gradient_checkpointing_func"  # the attribute in which transformers keeps the checkpoint function


class HasRankScales(Protocol):
    rank_scales: Tensor | None
    rows_agree: bool


class RoutedCheckpoint:
    """Calls ``checkpoint(forward, *args)`` with the rank scales as one more argument.

    An object rather than a closure: a deep copy of the model gets one of its own, with its own state.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: HasRankScales) -> None:
        self.checkpoint, self.state = checkpoint, state

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rank_scales = self.state.rank_scales
        if rank_scales is None:
            return self.checkpoint(forward, *args, **kwargs)
        return self.checkpoint(Segment(forward, self.state), rank_scales, *args, **kwargs)


class Segment:
    """``forward`` under given rank scales; afterwards the state is as it was."""

    def __init__(self, forward: Callable[..., Any], state: HasRankScales) -> None:
        self.forward, self.state, self.rows_agree = forward, state, state.rows_agree

    def __call__(self, rank_scales: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        before = state.rank_scales, state.rows_agree
        state.rank_scales, state.rows_agree = rank_scales, self.rows_agree
        try:
            return self.forward(*args, **kwargs)
        finally:
            state.rank_scales, state.rows_agree = before


def route_checkpoints(model: nn.Module, state: HasRankScales) -> None:
    """Wrap the checkpoint function of every module of ``model`` that has one; idempotent."""
    for module in model.modules():
        found = module.__dict__.get(HOOK)
        if found is not None and not isinstance(found, RoutedCheckpoint):
            setattr(module, HOOK, RoutedCheckpoint(found, state))


def unroute_checkpoints(model: nn.Module) -> None:
    """Give every module its own checkpoint function back."""
    for module in model.modules():
        found = module.__dict__.get(HOOK)
        if isinstance(found, RoutedCheckpoint):
            setattr(module, HOOK, found.checkpoint)
