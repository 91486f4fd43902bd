"""Weights that travel with a cache or with encoder outputs, and the names under which models take and give these.

A cache is known by what it is, not by its name: what a pool's forward has filled carries its mixture, and with it a
few of the tensors as that forward left them. If somebody has reordered, repeated, dropped or copied rows since, the
tensors are others, and the rows in them tell which weights are whose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..compat import CACHE_NAMES
from ..errors import WeightsError
from .mixture import Mixture

KEPT = "_sapt_kept"  # on a cache, a tensor of one, or encoder outputs: what a pool's forward left with it
WATCHED = 4  # tensors of a cache by which a change of rows shows
DEPTH = 8  # of objects in objects, down to the tensors of a cache


class Kept:
    """The mixture that a cache or encoder outputs were made with, and some tensors as they were then."""

    def __init__(self, mixture: Mixture, holder: Any) -> None:
        self.mixture, self.tasks = mixture, list(mixture.config.tasks)
        self.first = length_of(holder)  # tokens of its first filling, which later forwards add to
        self.tensors = [(tensor, _version(tensor)) for tensor in _some_tensors(holder)]
        self.is_copy = False  # of a cache: then what it was filled with may be the start of many prompts

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        memo[id(self)] = other = Kept(copy.deepcopy(self.mixture, memo), None)
        for tensor, version in self.tensors:  # those of the copied cache itself, which are in the memo
            twin = copy.deepcopy(tensor, memo)
            other.tensors.append((twin, _version(twin) if version == _version(tensor) else -1))
        other.is_copy, other.first = True, self.first
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tensors": [(tensor, _version(tensor) == version) for tensor, version in self.tensors]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = [(tensor, _version(tensor) if same else -1) for tensor, same in state["tensors"]]
        vars(self).update(state, tensors=tensors, is_copy=True)

    @property
    def virtual_tokens(self) -> int | None:
        """How many virtual tokens the cache begins with, if a pool of soft prompts filled it."""
        config = self.mixture.config
        return config.num_virtual_tokens if config.block == "prompt" else None

    def follow(self, holder: Any, what: str) -> tuple[Mixture, bool]:
        """The mixture for the rows that ``holder`` has now, and whether they begin several prompts: those of a copy,
        of rows that were repeated, or of a cache that was cut back to its first filling.

        Raises:
            WeightsError: rows were changed in a way that does not tell whose they are.
        """
        now = _some_tensors(holder)
        if len(now) == len(self.tensors) and all(
            new is old and _version(new) == version for new, (old, version) in zip(now, self.tensors, strict=True)
        ):
            return self.mixture, self.is_copy
        rows = len(self.mixture.weights)
        for new, (old, version) in zip(now, self.tensors, strict=False):
            if old.dim() > 1 and len(old) == rows and old.is_floating_point() and old.numel() and new is not old:
                if version == _version(old):
                    cut = new[0].numel() < old[0].numel() and length_of(holder) <= self.first
                    return self._of_rows(new, old, what), self.is_copy or cut or len(new) > rows
        raise WeightsError(
            f"{what} was changed in place since this pool filled it, so the weights of its rows are unknown. Change "
            "rows by methods of the cache, such as reorder_cache, or pass sapt_weights=[B, T] or sapt_task=name."
        )

    def _of_rows(self, new: Tensor, old: Tensor, what: str) -> Mixture:
        weights, index = self.mixture.weights, []
        common = [min(pair) for pair in zip(new.shape[1:], old.shape[1:], strict=False)]
        new, old = (_cut(t, common).reshape(len(t), -1) for t in (new.to(old), old))  # [B', n] and [B, n]
        for number, row in enumerate(new):
            same = (old == row).all(dim=1).nonzero().flatten() if row.numel() else old.new_empty(0)
            if not len(same) or bool((weights[same] != weights[same[0]]).any()):
                raise WeightsError(
                    f"Row {number} of {what} is none of the rows that this pool filled it with, or could be several, "
                    "so its attention weights are unknown. Pass sapt_weights=[B, T] or sapt_task=name."
                )
            index.append(int(same[0]))
        return self.mixture if index == list(range(len(weights))) else self.mixture.rows_at(index)


# --- finding caches --------------------------------------------------------------------------------------------------


def cache_among(inputs: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and object of the cache among the arguments of a forward; ("", None) if there is none."""
    usual = [name for name in CACHE_NAMES if inputs.get(name) is not None]
    names = [*usual, *(name for name in inputs if name not in CACHE_NAMES)]
    for name in names:
        value = inputs[name]
        if name == "encoder_outputs" or value is None or isinstance(value, (bool, int, float, str, Tensor)):
            continue
        if name in CACHE_NAMES or isinstance(value, Cache) or kept_with(value) is not None:
            return name, value
    return "", None


def past_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or None."""
    return cache_among(inputs)[1]


def is_filled(cache: Any) -> bool:
    """Whether ``cache`` holds tokens already."""
    if cache is None:
        return False
    return bool(length_of(cache)) or any(bool(tensor.any()) for tensor in _some_tensors(cache))


def kept_with(holder: Any) -> Kept | None:
    """What a pool's forward left with a cache or encoder outputs, if one made them."""
    if isinstance(holder, (list, tuple)):
        return next((k for tensor in _some_tensors(holder) if (k := getattr(tensor, KEPT, None)) is not None), None)
    found = getattr(holder, KEPT, None)
    return found if isinstance(found, Kept) else None


def virtual_tokens(cache: Any) -> int | None:
    """How many virtual tokens ``cache`` begins with, if a pool of soft prompts filled it."""
    kept = kept_with(cache)
    return None if kept is None else kept.virtual_tokens


# --- leaving weights -------------------------------------------------------------------------------------------------


def keep_with_output(output: Any, given: Any, mixture: Mixture, of_encoder: bool = False) -> Any:
    """Let what a forward has filled or put out carry the mixture of that forward; returns the cache, if there is one.

    Args:
        given: the cache that the forward got, which an output need not repeat.
        of_encoder: the output is that of an encoder alone, of whatever kind.
    """
    if mixture.weights.dim() == 3:
        return None  # per token of packed rows: nothing that a next token could continue
    caches = list(_caches_of(output, given))
    for cache in caches:
        _leave(cache, mixture.detached())
    encoded = hasattr(output, "last_hidden_state") and not hasattr(output, "logits")
    if not caches and (encoded or (of_encoder and isinstance(output, tuple))):
        _leave(output, mixture)
    return caches[0] if caches else None


def keep_after_generation(cache: Any, mixture: Mixture) -> None:
    """Let ``cache`` carry the ``mixture`` of the last forward of a ``generate``, in which rows move among the beams of
    a prompt alone; if it has other rows at the end, it carries nothing."""
    tensors = _some_tensors(cache)
    if tensors and tensors[0].is_floating_point() and len(tensors[0]) != len(mixture.weights):
        setattr(cache, KEPT, None)
    else:
        _leave(cache, mixture.detached())


def _caches_of(output: Any, given: Any) -> Iterator[Any]:
    if given is not None:
        yield given
    named = output.items() if isinstance(output, Mapping) else ((n, getattr(output, n, None)) for n in CACHE_NAMES)
    if isinstance(output, (list, tuple)):
        named = (("", value) for value in output)
    for name, value in named:
        if value is None or value is given or isinstance(value, Tensor):
            continue
        own = hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Mapping, type))
        unnamed = not name and isinstance(value, list)  # hidden states and attentions come as tuples
        if own or unnamed or (name in CACHE_NAMES and isinstance(value, (list, tuple))):
            yield value


def _leave(holder: Any, mixture: Mixture) -> None:
    """Attach ``mixture`` to ``holder``; to a list of tensors, which takes no attribute, by way of these."""
    kept, before = Kept(mixture, holder), kept_with(holder)
    if before is not None and before.first:
        kept.first = min(kept.first, before.first)
    for target in [tensor for tensor, _ in kept.tensors] if isinstance(holder, (list, tuple)) else [holder]:
        setattr(target, KEPT, kept)


def _some_tensors(holder: Any) -> list[Tensor]:
    """The last tensors in ``holder``, at most ``WATCHED``: of the last layer, which differ from prompt to prompt."""
    states = getattr(holder, "last_hidden_state", None)
    if isinstance(states, Tensor):
        return [states]
    layers = getattr(holder, "layers", None)
    if layers:  # the usual cache, found without a search
        pair = [getattr(layers[-1], name, None) for name in ("values", "keys")]
        if all(isinstance(tensor, Tensor) and tensor.dim() == 4 for tensor in pair):
            return pair  # type: ignore[return-value]  # tensors, as just seen
    found: list[Tensor] = []
    for tensor in _tensors_in(holder, DEPTH):
        found.append(tensor)
        if len(found) == WATCHED:
            break
    return found


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim() > 1:
            yield value
    elif depth and value is not None and not isinstance(value, (str, nn.Module, Kept, type)):
        inside: Any = value.values() if isinstance(value, Mapping) else value
        if not isinstance(inside, (list, tuple)):
            inside = list(inside) if isinstance(value, Mapping) else list(getattr(value, "__dict__", {}).values())
        for part in reversed(inside):
            yield from _tensors_in(part, depth - 1)


def length_of(cache: Any) -> int:
    """Tokens in ``cache``, where it tells; else 0."""
    asked = getattr(cache, "get_seq_length", None)
    try:
        return int(asked()) if callable(asked) else 0
    except (IndexError, NotImplementedError, StopIteration, TypeError, ValueError):
        return 0  # it has no attention layer, whose length it could tell


def _version(tensor: Tensor) -> float:
    """What changes when ``tensor`` is written to; torch counts no writes under inference_mode, so there it is a sum by
    which an exchange of rows shows."""
    if not tensor.is_inference():
        return tensor._version
    rows = tensor.float().flatten(1).sum(dim=1) if tensor.dim() > 1 else tensor.float()  # [B]
    found = float((rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum())
    return found if math.isfinite(found) else 0.0


def _cut(tensor: Tensor, sizes: list[int]) -> Tensor:
    for dim, size in enumerate(sizes, start=1):
        tensor = tensor.narrow(dim, 0, size)
    return tensor
