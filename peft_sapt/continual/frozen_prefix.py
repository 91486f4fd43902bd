"""The frozen layers below the lowest adapted one, run once per row and remembered.

With blocks on the topmost layers only, what the layers below compute for a row never changes: not from epoch to epoch,
not from task to task, nor from one method to the next. Each row is run alone, without padding, so that what is
remembered depends on the row and on nothing else.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..compat import cache_argument
from ..routing.caches import past_of

FAMILIES = ("llama",)  # whose decoder layers are called as below
CACHE_BYTES = (
    8 * 2**30
)  # bytes of rows that are remembered at most, and a quarter of a GPU's; the oldest are dropped first


class KnownRow(NamedTuple):
    """A row's hidden states [1, S, d] above the prefix, and keys and values [1, H, S, D] of its layers or None."""

    hidden: Tensor
    cached: list[tuple[Tensor, Tensor]] | None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.hidden, *(part for pair in self.cached or [] for part in pair)))


class FrozenPrefix(nn.Module):
    """Stands in place of a decoder's lowest layers, which it holds unregistered: nothing can adapt or train them.

    Copies of the model share it. Rows that it cannot tell (embeddings in place of tokens, tokens after a filled cache,
    positions that do not count from the row's first token) run through the layers as ever.
    """

    def __init__(self, decoder: Any, depth: int) -> None:
        super().__init__()
        self._below: tuple[list[Any], Any] = ([layer.eval() for layer in decoder.layers[:depth]], decoder.rotary_emb)
        self.rows: dict[tuple[int, ...], KnownRow] = {}
        self.bytes = 0  # of all rows
        self.spans: list[tuple[int, tuple[int, ...]]] | None = None  # of the forward under way: start, tokens

    @property
    def below(self) -> list[Any]:
        """The layers that it stands in place of."""
        return self._below[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenPrefix:
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenPrefix:
        layers, rotary = self._below
        before = _kind(layers[0])
        for module in (*layers, rotary):
            module._apply(fn)
        if _kind(layers[0]) != before:
            self.rows.clear()
            self.bytes = 0
        return super()._apply(fn, recurse)

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the decoder: which rows come."""
        ids, mask, cache = kwargs.get("input_ids"), kwargs.get("attention_mask"), past_of(kwargs)
        self.spans = None
        if ids is None or (cache is not None and cache.get_seq_length() > 0):
            return
        mask = torch.ones_like(ids) if mask is None else mask
        if mask.dim() != 2 or mask.shape != ids.shape or not bool(mask.any(dim=1).all()):
            return
        first, count = mask.int().argmax(dim=1, keepdim=True), mask.bool().sum(dim=1, keepdim=True)  # [B, 1]
        places = torch.arange(mask.shape[1], device=mask.device)
        if bool((((places >= first) & (places < first + count)) == mask.bool()).all()):  # rows without gaps
            rows = zip(first[:, 0].tolist(), count[:, 0].tolist(), ids.tolist(), strict=True)
            self.spans = [(start, tuple(row[start : start + count])) for start, count, row in rows]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # hidden_states [B, S, d], the token embeddings -> [B, S, d]
        spans, cache = self.spans, past_of(kwargs)
        self.spans = None  # of this forward alone
        fill = cache is not None
        if spans is None or (fill and not counts_from_first_token(position_ids, spans)):
            for layer in self._below[0]:
                hidden_states = layer(
                    hidden_states, attention_mask=attention_mask, position_ids=position_ids, **kwargs
                )
            return hidden_states
        found = [
            self.look_up(tokens, hidden_states[i : i + 1, start : start + len(tokens)], fill)
            for i, (start, tokens) in enumerate(spans)
        ]
        result = torch.zeros_like(hidden_states)
        for i, ((start, tokens), known) in enumerate(zip(spans, found, strict=True)):
            result[i, start : start + len(tokens)] = known.hidden[0]
        if fill:
            self.fill(cache, found, spans, hidden_states.shape[1])
        return result

    def look_up(self, tokens: tuple[int, ...], embeddings: Tensor, fill: bool) -> KnownRow:
        known = self.rows.get(tokens)
        if known is None or (fill and known.cached is None):
            self.forget(tokens)
            known = self.rows[tokens] = self.compute(embeddings.detach(), fill)
            self.bytes += known.bytes
            while self.bytes > cache_budget(embeddings.device) and len(self.rows) > 1:
                self.forget(next(iter(self.rows)))
        return known

    def forget(self, tokens: tuple[int, ...]) -> None:
        known = self.rows.pop(tokens, None)
        self.bytes -= 0 if known is None else known.bytes

    @torch.no_grad()
    def compute(self, hidden: Tensor, fill: bool) -> KnownRow:
        layers, rotary = self._below
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        cache: Any = DynamicCache() if fill else None
        embeddings = rotary(hidden, position_ids=positions)
        for layer in layers:
            filling = {cache_argument(layer): cache, "use_cache": fill}
            hidden = layer(hidden, position_ids=positions, position_embeddings=embeddings, **filling)
        kept = None if cache is None else [(layer.keys, layer.values) for layer in cache.layers]
        return KnownRow(hidden, kept)

    def fill(self, cache: Any, found: list[KnownRow], spans: list[tuple[int, tuple[int, ...]]], width: int) -> None:
        """Give ``cache`` the keys and values that the layers would have."""
        for index in range(len(self._below[0])):
            pair = []
            for which in (0, 1):
                first = found[0].cached[index][which]  # type: ignore[index]  # rows were computed with their cache
                padded = first.new_zeros(len(found), first.shape[1], width, first.shape[3])
                for i, ((start, tokens), known) in enumerate(zip(spans, found, strict=True)):
                    padded[i, :, start : start + len(tokens)] = known.cached[index][which][0]  # type: ignore[index]  # rows were computed with their cache
                pair.append(padded)
            cache.update(*pair, index)


class SkippedLayer(nn.Module):
    """A layer of the prefix, whose part was done by the first."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


def _kind(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    first = next(module.parameters())
    return first.device, first.dtype


def cache_budget(device: torch.device) -> int:
    """Bytes that rows may take on ``device``."""
    if device.type != "cuda":
        return CACHE_BYTES
    return min(CACHE_BYTES, torch.cuda.get_device_properties(device).total_memory // 4)


def counts_from_first_token(position_ids: Tensor | None, spans: list[tuple[int, tuple[int, ...]]]) -> bool:
    if position_ids is None or len(position_ids) not in (1, len(spans)):
        return False
    rows = position_ids.expand(len(spans), -1).tolist()
    return all(
        row[start : start + len(tokens)] == list(range(len(tokens)))
        for row, (start, tokens) in zip(rows, spans, strict=True)
    )


def with_frozen_prefix(base: nn.Module, depth: int) -> nn.Module | None:
    """A copy of ``base`` that remembers its lowest ``depth`` layers, or None for a family that is not supported."""
    config: Any = base.config
    if depth < 1 or config.model_type not in FAMILIES or config.attention_dropout:
        return None
    model = copy.deepcopy(base)
    decoder = model.get_decoder()  # type: ignore[operator]  # a decoder-only model has it
    prefix = FrozenPrefix(decoder, depth)
    for index in range(depth):
        decoder.layers[index] = SkippedLayer() if index else prefix
    decoder.register_forward_pre_hook(prefix.note, with_kwargs=True)
    model.config.use_cache = False  # type: ignore[union-attr]  # in training; generate() asks for one by itself
    return model
