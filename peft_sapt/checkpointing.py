"""Gradient checkpointing: the gates of a forward become an input of each checkpointed segment.

transformers reruns a layer's ``forward`` in the backward pass, when the model's own forward is long over and perhaps
another one has run since; on CUDA it does so in another thread. What the layers would read from a shared place then is
gone or foreign. As an explicit argument the gates are kept by autograd with the segment, and take their gradient
through it, reentrant or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

HOOK = "_gradient_checkpointing_func"  # the attribute in which transformers keeps the checkpoint function


class Gated(Protocol):
    gates: Tensor | None


class GatedCheckpoint:
    """Calls ``checkpoint(forward, *args)`` with the gates as one more argument.

    An object rather than a closure: a deep copy of the model gets one of its own, with its own routing.
    """

    def __init__(self, checkpoint: Callable[..., Any], routing: Gated) -> None:
        self.checkpoint, self.routing = checkpoint, routing

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gates = self.routing.gates
        if gates is None:
            return self.checkpoint(forward, *args, **kwargs)
        return self.checkpoint(Segment(forward, self.routing), gates, *args, **kwargs)


class Segment:
    """``forward`` under given gates; afterwards the routing is as it was."""

    def __init__(self, forward: Callable[..., Any], routing: Gated) -> None:
        self.forward, self.routing = forward, routing

    def __call__(self, gates: Tensor, *args: Any, **kwargs: Any) -> Any:
        before, self.routing.gates = self.routing.gates, gates
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.routing.gates = before


def gate_checkpoints(model: nn.Module, routing: Gated) -> None:
    """Wrap the checkpoint function of every module of ``model`` that has one; idempotent."""
    for module in model.modules():
        found = module.__dict__.get(HOOK)
        if found is not None and not isinstance(found, GatedCheckpoint):
            setattr(module, HOOK, GatedCheckpoint(found, routing))


def ungate_checkpoints(model: nn.Module) -> None:
    """Give every module its own checkpoint function back."""
    for module in model.modules():
        found = module.__dict__.get(HOOK)
        if isinstance(found, GatedCheckpoint):
            setattr(module, HOOK, found.checkpoint)
