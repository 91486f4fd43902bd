"""What lasts for one forward, and what lasts for one generation: per thread, and never saved."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .mixture import Mixture, Stack


@dataclass
class GenerationSession:
    """One ``generate``: its mixture, and by layer the factors stacked for it, as no block can change meanwhile."""

    mixture: Mixture
    stacks: dict[nn.Module, Stack] = field(default_factory=dict)
    prompt: Tensor | None = None  # [B, S], its token ids, where it was given any
    cache: Any = None  # that its forwards fill
    last: Mixture | None = None  # of its last forward, for as many rows as that had


class ForwardState(threading.local):
    """The weights of the forward under way, shared by all layers; each thread has its own, copies start empty."""

    def __init__(self) -> None:
        self.mixture: Mixture | None = None
        self.weights: Tensor | None = None  # [B, T], or [B, S, T] for packed rows
        self.rank_scales: Tensor | None = None  # [B, R] or [B, S, R]
        self.owner: nn.Module | None = None  # the module whose forward they belong to
        self.cache: Any = None  # that this forward was given to fill
        self.rows_agree = True  # where the base has towers: each prompt has one image or clip of its own
        self.generates = False  # whether this forward is one of the generation under way
        self.inserted: Any = None  # where virtual tokens stand in it, which are cut out of its logits
        self.session: GenerationSession | None = None  # while generate() runs
        self.blocks_are_off = False  # while the base model alone reads a prompt

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardState:
        memo[id(self)] = fresh = ForwardState()
        return fresh

    def __reduce__(self) -> tuple[type[ForwardState], tuple[()]]:
        return ForwardState, ()

    def use(self, mixture: Mixture) -> None:
        """Let the layers of this forward mix by ``mixture``."""
        self.mixture, self.weights, self.rank_scales = mixture, mixture.weights, mixture.rank_scales

    @contextmanager
    def without_blocks(self) -> Iterator[None]:
        """Let every layer answer as the base model's does."""
        self.blocks_are_off = True
        try:
            yield
        finally:
            self.blocks_are_off = False

    def clear(self) -> None:
        """Forget the forward; a session goes on."""
        self.mixture = self.weights = self.rank_scales = self.owner = self.cache = self.inserted = None
        self.rows_agree, self.generates = True, False
