"""The weights of a batch of sequences, and what follows from them for as long as they are held.

While a sequence is generated its weights do not change, so what depends on them alone is made once: the rank scales,
and where few blocks have any weight, the rows of the frozen ones among them, which each layer gathers at its first
token. A token then costs what these blocks cost, however many others the pool holds. Within one ``generate``, where
no block can change, a layer also puts frozen and newest rows in one stack, unless the pool is large and all of it
counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import SaptConfig
from ..ops import rank_scales
from .weights import spread

KEEP_AT_MOST = 0.5  # share of all ranks above which gathering rows would save less than it costs
STACK_AT_MOST = 128  # ranks of a pool above which one product less is not worth a second copy of the factors
Stack = tuple[Tensor, Tensor, Tensor]  # factors [R', in] and [R', out], rank scales [B, R']
Factors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor]  # old_a, old_b, a, b, rank scales
GatheredRows = tuple[list[Any], tuple[Tensor, Tensor]]  # gathered rows, and the parts that they were taken from


class Mixture:
    """Weights [B, T] (or [B, S, T]) of the pool ``adapter``, and the rank scales [B, R] (or [B, S, R]) from them."""

    def __init__(self, adapter: str, weights: Tensor, config: SaptConfig) -> None:
        self.adapter, self.weights, self.config = adapter, weights, config
        self.rank_scales = rank_scales(weights, config.scalings, config.task_ranks)
        self.rows: Tensor | None = None  # [R'], ranks of the blocks with any weight, once held and if they are few
        self.few_scales: Tensor | None = None  # [B, R']
        self._frozen: Tensor | None = None  # those of ``rows`` that belong to frozen blocks
        self.held = False
        self._wider: Mixture | None = None
        self._old_rows: dict[Any, GatheredRows] = {}

    def __reduce__(self) -> tuple[type[Mixture], tuple[Any, ...]]:
        return Mixture, (self.adapter, self.weights.detach().clone(), self.config)  # no layers, no gathered rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixture:
        return Mixture(self.adapter, self.weights.detach().clone(), self.config)

    def detached(self) -> Mixture:
        """The same without a graph behind it."""
        return Mixture(self.adapter, self.weights.detach(), self.config) if self.weights.requires_grad else self

    def rows_at(self, index: list[int]) -> Mixture:
        """The same for rows in another order, some perhaps several times and some no more."""
        return Mixture(self.adapter, self.weights[torch.tensor(index, device=self.weights.device)], self.config)

    def spread(self, batch: int, what: str) -> Mixture:
        """The same for ``batch`` rows: each row repeated for its beams or return sequences."""
        if len(self.weights) == batch:
            return self
        if self._wider is None or len(self._wider.weights) != batch:
            self._wider = Mixture(self.adapter, spread(self.weights, batch, what), self.config)
            self._wider._keep(self.rows, self._frozen)
            self._wider._old_rows = self._old_rows
            self._wider.held = self.held
        return self._wider

    def hold(self) -> Mixture:
        """From now on the same weights serve many forwards: find out which blocks matter. Returns itself."""
        if self.held or self.weights.dim() != 2:
            return self
        self.held = True
        used = (self.weights != 0).any(dim=0)  # [T]
        ranks = torch.tensor(self.config.task_ranks, device=used.device)
        if 0 < int(ranks[used].sum()) <= KEEP_AT_MOST * self.rank_scales.shape[-1]:
            rows = used.repeat_interleave(ranks).nonzero().flatten()
            self._keep(rows, rows[rows < ranks[:-1].sum()])
        return self

    def _keep(self, rows: Tensor | None, frozen: Tensor | None) -> None:
        self.rows, self._frozen = rows, frozen
        self.few_scales = None if rows is None else self.rank_scales[:, rows]

    def stacked(self, stacks: dict[Any, Stack], layer: Any) -> Stack | None:
        """The stack that ``layer`` made for this very mixture in the generation under way."""
        known, own = stacks.get(layer), self.rank_scales if self.few_scales is None else self.few_scales
        return known if known is not None and known[2] is own else None

    def factors(self, layer: Any, parts: tuple[Tensor | None, Tensor | None, Tensor, Tensor]) -> Factors:
        """Those of ``layer``'s factors old_a, old_b, a, b that count, and their rank scales.

        The newest block is taken as it is now, since an optimizer may write to it without a trace; frozen rows are
        gathered once, and again when their tensors are others.
        """
        old_a, old_b, a, b = parts
        found: Factors = (*parts, self.rank_scales)
        if self.few_scales is not None and self.rows is not None and self._frozen is not None:
            newest = (a, b) if len(self._frozen) < len(self.rows) else (None, None)
            found = (*self._gathered(layer, old_a, old_b), *newest, self.few_scales)
        session = layer.forward_state.session
        stacks = None if session is None else session.stacks
        if stacks is not None and found[-1].shape[-1] <= STACK_AT_MOST:
            stack = _joined(found[0], found[2]), _joined(found[1], found[3]), found[-1]
            stacks[layer] = stack
            return stack[0], stack[1], None, None, stack[2]
        return found

    def _gathered(self, layer: Any, old_a: Tensor | None, old_b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if old_a is None or old_b is None or self._frozen is None or not len(self._frozen):
            return None, None
        sources = [(part, _state(part)) for part in (old_a, old_b)]
        known = self._old_rows.get(layer)
        if known is None or any(p is not q or v != w for (p, v), (q, w) in zip(known[0], sources, strict=True)):
            rows = self._frozen.to(old_a.device)
            known = self._old_rows[layer] = sources, (old_a[rows], old_b[rows])
        return known[1]


def _state(part: Tensor) -> tuple[int, int]:
    """What changes when ``part`` is written to, or moved or cast in place."""
    return (0 if part.is_inference() else part._version), part.data_ptr()


def _joined(old: Tensor | None, new: Tensor | None) -> Tensor:
    parts = [part for part in (old, new) if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
