"""The weights of a batch of sequences, and what follows from them for as long as they are held.

While a sequence is generated its weights do not change, so what depends on them alone is made once: the gates, and
where few blocks have any weight, the rows of those blocks, gathered by each layer at its first token. A token then
costs what these blocks cost, however many others the pool holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import SaptConfig
from .ops import rank_gates
from .weights import spread

KEEP_AT_MOST = 0.5  # share of all ranks above which gathering rows would save less than it costs


class Mixture:
    """Weights [B, T] (or [B, S, T]) of the pool ``adapter``, and the gates [B, R] (or [B, S, R]) of its ranks."""

    def __init__(self, adapter: str, weights: Tensor, config: SaptConfig) -> None:
        self.adapter, self.weights, self.config = adapter, weights, config
        self.gates = rank_gates(weights, config.scalings, config.task_ranks or [])
        self.rows: Tensor | None = None  # [R'], ranks of the blocks with any weight, once held and if they are few
        self.few_gates: Tensor | None = None  # [B, R']
        self.held = False
        self._wider: Mixture | None = None
        self._factors: dict[Any, tuple[list[Any], tuple[Tensor, Tensor]]] = {}

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

    def _keep(self, rows: Tensor | None, factors: dict) -> None:
        self.rows, self._factors = rows, factors
        self.few_gates = None if rows is None else self.gates[:, rows]

    def gathered(self, layer: Any, parts: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """Rows [R', in] and [R', out] of ``layer``'s factors old_a, old_b, a, b; anew if one of them has changed."""
        sources = [(part, _version(part)) for part in parts]
        known = self._factors.get(layer)
        if known is not None and all(p is q and v == w for (p, v), (q, w) in zip(known[0], sources, strict=True)):
            return known[1]
        old_a, old_b, a, b = parts
        assert self.rows is not None and a is not None and b is not None
        pair = _rows(old_a, a, self.rows), _rows(old_b, b, self.rows)
        self._factors[layer] = (sources, pair)
        return pair


def _version(part: Tensor | None) -> int:
    return 0 if part is None or part.is_inference() else part._version


def _rows(old: Tensor | None, new: Tensor, rows: Tensor) -> Tensor:
    """``rows`` of the two stacked, without stacking them."""
    if old is None:
        return new[rows]
    count = old.shape[0]
    return torch.cat([old[rows[rows < count]], new[rows[rows >= count] - count]])
