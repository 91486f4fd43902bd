"""Weights that travel with a cache or with encoder outputs, and the names under which models take and give these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .mixture import Mixture

PAST = "past_key_values"  # argument of a forward, and attribute of its output
CACHE_ATTRIBUTE = "_sapt_mixture"  # on a cache or on encoder outputs: the mixture that they were made with
VIRTUAL_ATTRIBUTE = "_sapt_virtual"  # on a cache: the number of virtual tokens it begins with


def past_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward, or None."""
    return inputs.get(PAST)


def is_filled(cache: Any) -> bool:
    """Whether ``cache`` holds tokens already."""
    return cache is not None and hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0


def kept_with(holder: Any) -> Mixture | None:
    """The mixture that a cache or encoder outputs were made with, if a pool made them."""
    return getattr(holder, CACHE_ATTRIBUTE, None)


def virtual_tokens(cache: Any) -> int | None:
    """How many virtual tokens ``cache`` begins with, if a pool of soft prompts filled it."""
    return getattr(cache, VIRTUAL_ATTRIBUTE, None)


def keep_with_output(output: Any, given: Any, mixture: Mixture) -> None:
    """Let what a forward has filled or put out carry the mixture of that forward.

    Args:
        given: the cache that the forward got, which an output need not repeat.
    """
    if mixture.weights.dim() == 3:
        return  # per token of packed rows: nothing that a next token could continue
    cache = getattr(output, PAST, given)
    if cache is not None and not isinstance(cache, tuple):
        setattr(cache, CACHE_ATTRIBUTE, mixture.detached())
        if mixture.config.block == "prompt":
            setattr(cache, VIRTUAL_ATTRIBUTE, mixture.config.num_virtual_tokens)
    elif hasattr(output, "last_hidden_state") and not hasattr(output, "logits"):
        setattr(output, CACHE_ATTRIBUTE, mixture)
