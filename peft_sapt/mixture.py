"""The weights of a batch of sequences, and what follows from them for as long as they are held.

While a sequence is generated its weights do not change, so what depends on them alone is made once: the gates, and
where few blocks have any weight, the rows of those blocks, gathered by each layer at its first token. A token then
costs what these blocks cost, however many others the pool holds. Of a small pool whose blocks all count, the frozen
and the newest rows are put together once for all sequences, which spares each token a product.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from .config import SaptConfig
from .ops import rank_gates
from .weights import spread

KEEP_AT_MOST = 0.5  # share of all ranks above which gathering rows would save less than it costs
STACK_AT_MOST = 128  # ranks of a pool above which one product less is not worth a second copy of the factors
Pair = tuple[Tensor, Tensor]
Held = tuple[Tensor, Tensor, Tensor]  # factors [R', in] and [R', out] in one stack each, gates [B, R']
Known = tuple[list[Any], Pair]  # factors, and what they were made of


class Mixture:
    """Weights [B, T] (or [B, S, T]) of the pool ``adapter``, and the gates [B, R] (or [B, S, R]) of its ranks."""

    def __init__(self, adapter: str, weights: Tensor, config: SaptConfig) -> None:
        self.adapter, self.weights, self.config = adapter, weights, config
        self.gates = rank_gates(weights, config.scalings, config.task_ranks or [])
        self.rows: Tensor | None = None  # [R'], ranks of the blocks with any weight, once held and if they are few
        self.few_gates: Tensor | None = None  # [B, R']
        self.held = False
        self._wider: Mixture | None = None
        self._factors: MutableMapping[Any, Known] = {}

    def __reduce__(self) -> tuple[type[Mixture], tuple[Any, ...]]:
        return Mixture, (self.adapter, self.weights.detach().clone(), self.config)  # no layers, no gathered rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixture:
        return Mixture(self.adapter, self.weights.detach().clone(), self.config)

    def detached(self) -> Mixture:
        """The same without a graph behind it."""
        return Mixture(self.adapter, self.weights.detach(), self.config) if self.weights.requires_grad else self

    def spread(self, batch: int, what: str) -> Mixture:
        """The same for ``batch`` rows: each row repeated for its beams or return sequences."""
        if len(self.weights) == batch:
            return self
        if self._wider is None or len(self._wider.weights) != batch:
            self._wider = Mixture(self.adapter, spread(self.weights, batch, what), self.config)
            self._wider._keep(self.rows, self._factors)
            self._wider.held = self.held
        return self._wider

    def hold(self) -> Mixture:
        """From now on the same weights serve many forwards: find out which blocks matter. Returns itself."""
        if self.held or self.weights.dim() != 2:
            return self
        self.held = True
        used = (self.weights != 0).any(dim=0)  # [T]
        ranks = torch.tensor(self.config.task_ranks, device=used.device)
        if int(ranks[used].sum()) <= KEEP_AT_MOST * self.gates.shape[-1]:
            self._keep(used.repeat_interleave(ranks).nonzero().flatten(), self._factors)
        return self

    def _keep(self, rows: Tensor | None, factors: MutableMapping[Any, Known]) -> None:
        self.rows, self._factors = rows, factors
        self.few_gates = None if rows is None else self.gates[:, rows]

    def factors(self, layer: Any, parts: tuple[Tensor | None, ...]) -> Held | None:
        """Factors [R', in] and [R', out] of ``layer``'s blocks in one stack each, and their gates [B, R'].

        Args:
            parts: the layer's factors old_a, old_b, a, b; the stacks are made anew if one of them has changed.

        Returns:
            None where all blocks of a large pool count: it is cheaper to take them as they lie.
        """
        if self.few_gates is not None:
            held: Held = *_remembered(self._factors, layer, parts, self.rows), self.few_gates
        elif self.gates.shape[-1] <= STACK_AT_MOST:
            held = *_remembered(layer.routing.stacks, layer, parts, None), self.gates
        else:
            return None
        if layer.routing.held is not None:
            layer.routing.held[layer] = held
        return held


def _remembered(known: MutableMapping[Any, Known], layer: Any, parts: tuple, rows: Tensor | None) -> Pair:
    sources = [(part, _state(part)) for part in parts]
    before = known.get(layer)
    if before is not None and all(p is q and v == w for (p, v), (q, w) in zip(before[0], sources, strict=True)):
        return before[1]
    old_a, old_b, a, b = parts
    pair = _rows(old_a, a, rows), _rows(old_b, b, rows)
    known[layer] = (sources, pair)
    return pair


def _state(part: Tensor | None) -> tuple[int, int]:
    """What changes when ``part`` is written to, or moved or cast in place."""
    if part is None:
        return 0, 0
    return (0 if part.is_inference() else part._version), part.data_ptr()


def _rows(old: Tensor | None, new: Tensor, rows: Tensor | None) -> Tensor:
    """``rows`` of the two stacked, without stacking them; all of them for None."""
    if rows is None:
        return new if old is None else torch.cat([old, new])
    if old is None:
        return new[rows]
    count = old.shape[0]
    return torch.cat([old[rows[rows < count]], new[rows[rows >= count] - count]])
