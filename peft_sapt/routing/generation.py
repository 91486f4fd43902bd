"""``generate`` with a pool: the weights are computed once, on the whole prompt, and held until the last token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from ..errors import SaptError
from .caches import cache_among, is_filled, keep_after_generation, kept_with
from .forward_state import ForwardState, GenerationSession
from .hooks import RoutingHooks, batch_of
from .mixture import Mixture
from .prompt_mask import inferred_mask

REFUSED = {  # of generate's arguments, with soft prompts
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt lookup decoding",
    "prefill_chunk_size": "chunked prefill",
    "cache_implementation": "a cache other than the default one",
}
OF_A_FORWARD = ("labels", "position_ids", "seq_idx", "cu_seq_lens_q")  # each row of a generation is one prompt


@contextmanager
def held(state: ForwardState, session: GenerationSession | None) -> Iterator[None]:
    """Let the forwards of one generation use the mixture of ``session``; with None, what each finds by itself."""
    previous, state.session = state.session, session
    try:
        yield
        if session is not None and session.cache is not None and session.last is not None:
            keep_after_generation(session.cache, session.last)
    finally:
        state.session = previous


def session_of(hooks: RoutingHooks, adapter: str, args: tuple, kwargs: dict[str, Any]) -> GenerationSession | None:
    """What one call of ``generate`` with ``args`` and ``kwargs`` holds to its end; None where no prompt is in it."""
    base, config = cast(Any, hooks.base), hooks.config_of(adapter)
    inputs = {name: value for name, value in kwargs.items() if name not in OF_A_FORWARD}
    prompt = args[0] if args else inputs.pop("inputs", None)
    if prompt is not None:
        inputs[getattr(base, "main_input_name", "input_ids")] = prompt
    explicit = any(inputs.get(name) is not None for name in ("sapt_task", "sapt_weights"))
    name, cache = cache_among(inputs)
    if not explicit and cache is not None and kept_with(cache) is None:
        inputs.pop(name)  # filled by somebody else: the whole prompt is here, so attend to it
    if inputs.get("attention_mask") is None and isinstance(inputs.get("input_ids"), Tensor):
        inputs["attention_mask"] = inferred_mask(inputs["input_ids"], *special_tokens(base, inputs))
    ids = inputs.get("input_ids")
    prompted = isinstance(ids, Tensor) or isinstance(inputs.get("inputs_embeds"), Tensor)
    if not prompted and not explicit and inputs.get("encoder_outputs") is None:
        return None  # generation from the start token alone: its forward is the prompt
    batch = batch_of(inputs, at_least_one=True)
    if not prompted and explicit:
        mixture = Mixture(adapter, hooks.given_weights(adapter, inputs, batch, hooks.memory.device), config)
    else:
        mixture = hooks.mixture_for(base, adapter, inputs, whole=True).spread(batch, "generate")
    return GenerationSession(mixture.hold(), prompt=ids if isinstance(ids, Tensor) else None)


def special_tokens(base: Any, kwargs: dict[str, Any]) -> tuple[int | None, int | list[int] | None]:
    """Pad and end token as ``generate`` resolves them: argument, generation config, model config."""
    sources = [kwargs.get("generation_config"), base.generation_config, base.config]

    def find(name: str) -> Any:
        found = [kwargs.get(name), *(getattr(source, name, None) for source in sources)]
        return next((value for value in found if value is not None), None)

    return find("pad_token_id"), find("eos_token_id")


def check_prompt_generation(kwargs: dict[str, Any], *configs: Any) -> None:
    """Refuse, for soft prompts, what ``generate`` does with lengths of its own, which know of no virtual tokens.

    Raises:
        SaptError: a static cache, assisted decoding, chunked prefill, or a filled cache.
    """
    argument, cache = cache_among(kwargs)
    for name, what in REFUSED.items():
        asked = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        value = next((v for v in asked if v is not None), None)
        if value is not None and value != "dynamic":
            raise SaptError(f"generate({name}=...) is not supported with block='prompt': leave {what} away.")
    if cache is not None and (getattr(cache, "is_compileable", False) or is_filled(cache)):
        raise SaptError(
            f"generate({argument}=...) with a static or filled cache is not supported with block='prompt': give the "
            "whole prompt without it."
        )
