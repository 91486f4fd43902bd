"""Hidden states of the frozen base model as what a prompt is told by: a partial forward, without any block.

Each prompt runs alone, its tokens next to one another from position 0 on, up to one layer and no further. So its
feature depends on its own tokens and on nothing else: not on padding, batch mates, packing or the answer behind it,
and not on the pool, whose blocks are off. Once per prompt; no token that is generated costs anything.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SaptError
from ..pool_module import sharding_of
from .forward_state import ForwardState
from .packing import rows_of_segments
from .prompt_mask import is_encoder_decoder

DEPTH = 0.3  # of the layers, by default: where wordings that were never trained on find their block, at a third's cost
SHARDED = (
    "features='hidden' reads the base model's lowest layers by themselves, which FSDP gathers in a forward of the "
    "whole model alone: build the pool with SaptConfig(features='both')."
)
SWITCHING = threading.RLock()  # held while a model in train mode reads a prompt as in eval mode
AT_ONCE = 16384  # tokens of prompts that run together, padding among them


class StopForward(Exception):
    """Raised once the wanted layer has run; it never leaves this file."""


def text_model(module: nn.Module) -> Any:
    """The part of ``module`` that reads the prompt: its encoder, if it is an encoder-decoder, or its decoder."""
    known: Any = module
    if is_encoder_decoder(module):
        return known.get_encoder()
    found = known.get_decoder() if callable(getattr(known, "get_decoder", None)) else None
    return found if isinstance(found, nn.Module) else module


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers that read a prompt, lowest first; none where they cannot be told.

    They are the largest list of modules, as many as the config has hidden layers, in the part of the model that reads
    text, if that takes embeddings.
    """
    part = text_model(module)
    if "inputs_embeds" not in inspect.signature(part.forward).parameters:
        return []
    settings = text_config(part)
    names = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers")
    wanted = {getattr(settings, name, None) for name in names}
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) in wanted]
    sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
    found = list(lists[max(range(len(lists)), key=sizes.__getitem__)]) if lists else []
    below = getattr(found[0], "below", []) if found else []  # of a module that stands in place of the lowest layers
    return [*below, *found[len(below) :]]


def text_config(module: nn.Module) -> Any:
    """The config of ``module``, of one that reads more than text that of its text; None if it has none."""
    settings: Any = getattr(module, "config", None)
    return settings.get_text_config() if hasattr(settings, "get_text_config") else settings


def default_layer(count: int) -> int:
    """How many of ``count`` layers run by default."""
    return max(1, round(DEPTH * count))


@torch.no_grad()
def hidden_features(
    module: nn.Module,
    state: ForwardState,
    layer: int,
    width: int,
    embeddings: Tensor,
    mask: Tensor,
    segments: Tensor | None,
) -> Tensor:
    """Mean hidden state of each prompt above ``layer`` layers: [N, width] in float32, NaN where a prompt is empty.

    Args:
        module: the base model, or its encoder.
        width: of a hidden state.
        embeddings: of all tokens, [B, S, d].
        mask: True on prompt tokens, [B, S].
        segments: of packed rows, the prompt that each token belongs to, [B, S]; then N is their number, else B.

    Raises:
        SaptError: the model is sharded: its layers are gathered in a forward of the whole model alone.
    """
    if sharding_of(module) is not None:
        raise SaptError(SHARDED)
    rows, places, count = rows_of_segments(mask, segments)  # [M] each, M tokens of N = count prompts
    tokens, lengths = embeddings[mask], torch.bincount(rows, minlength=count)  # [M, d], [N]
    found = torch.full((count, width), torch.nan, device=mask.device)
    for chunk in parts_of(module, lengths):
        where = torch.full((count,), -1, device=mask.device)
        where[chunk] = torch.arange(len(chunk), device=mask.device)
        chosen = where[rows] >= 0
        batch = tokens.new_zeros(len(chunk), int(lengths[chunk].max()), embeddings.shape[-1])
        attended = torch.zeros(batch.shape[:2], dtype=torch.bool, device=mask.device)
        batch[where[rows[chosen]], places[chosen]] = tokens[chosen]
        attended[where[rows[chosen]], places[chosen]] = True
        found[chunk] = mean_state(run_layers(module, state, layer, batch, attended), attended)
    return found


def parts_of(module: nn.Module, lengths: Tensor) -> list[Tensor]:
    """Prompts with ``lengths`` [N] in parts that run together, by their numbers.

    No part is square, so that a layer which has positions first is told by its shape. Where positions depend on the
    longest row of a batch, each prompt is a part.
    """
    order = lengths.argsort()
    order = order[lengths[order] > 0]
    if not len(order):
        return []
    size = 1 if depends_on_longest(module) else max(1, AT_ONCE // int(lengths.max()))
    parts = []
    for chunk in order.split(size):
        square = len(chunk) > 1 and len(chunk) == int(lengths[chunk].max())
        parts += [chunk[:1], chunk[1:]] if square else [chunk]
    return parts


def depends_on_longest(module: nn.Module) -> bool:
    """Whether rotary positions of ``module`` are scaled by the longest row of a batch."""
    settings = text_config(text_model(module))
    found = [getattr(settings, name, None) for name in ("rope_parameters", "rope_scaling")]
    kinds = [part for given in found if isinstance(given, dict) for part in (given, *given.values())]
    return any(isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the tokens' states, each standardised over its width: [B, S, d] -> [B, d] in float32.

    Standardised, since a few tokens (mostly the first) have states many times as large as all others.
    """
    x = torch.nn.functional.layer_norm(states.float(), states.shape[-1:])
    return x.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def run_layers(module: nn.Module, state: ForwardState, layer: int, embeddings: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, S, d] above ``layer`` layers of ``module``, which is not called itself: no hook runs."""
    part, thread = text_model(module), threading.get_ident()
    known = inspect.signature(part.forward).parameters
    inputs = {"inputs_embeds": embeddings, "attention_mask": mask.long(), "use_cache": False}
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, output: Any) -> None:
        if threading.get_ident() != thread:  # of another thread, whose forward goes on
            return
        kept.append(output if isinstance(output, Tensor) else output[0])
        raise StopForward

    handle = layers_of(module)[layer - 1].register_forward_hook(keep)
    mixed = len({p.dtype for p in part.parameters() if p.is_floating_point()}) > 1  # which autocast alone makes run
    plain = nullcontext() if mixed else torch.autocast(embeddings.device.type, enabled=False)
    try:
        with state.without_blocks(), evaluating(part), plain:
            part.forward(**{name: value for name, value in inputs.items() if name in known or "kwargs" in known})
    except StopForward:
        pass
    finally:
        handle.remove()
    return in_rows(kept[0], mask)


def in_rows(states: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, S, d], of a layer that may have them as [S, B, d]; ``mask`` [B, S] is not square.

    Raises:
        SaptError: they are neither.
    """
    if states.dim() == 3 and states.shape[:2] == mask.shape:
        return states
    if states.dim() == 3 and states.shape[:2] == mask.mT.shape:
        return states.transpose(0, 1)
    raise SaptError(
        f"A layer of the base model gave {list(states.shape)} for {list(mask.shape)} tokens, in which a prompt's own "
        "cannot be found: use features='both'."
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode, each part as it was afterwards: training must read what inference reads.

    Left as it is where training changes nothing, as in models without dropout, since other threads may be training it;
    else these take turns. Quantised layers stay as they are, for in eval mode some pack their weights so that these
    give no gradient later.
    """
    if not module.training or not differs_in_training(module):
        yield
        return
    with SWITCHING:
        training = [part for part in module.modules() if part.training and not is_quantised(part)]
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True


def differs_in_training(module: nn.Module) -> bool:
    """Whether ``module`` may answer otherwise in train mode: by dropout, running means, or checkpointed layers."""
    settings = getattr(text_config(module), "__dict__", {})
    named = [value for name, value in settings.items() if "drop" in name and isinstance(value, float)]
    live = any(
        (isinstance(part, nn.Dropout) and part.p > 0) or getattr(part, "running_mean", None) is not None
        for part in module.modules()
    )
    return live or any(named) or bool(getattr(module, "is_gradient_checkpointing", False))


def is_quantised(module: nn.Module) -> bool:
    """Whether ``module`` itself has weights that are no floating-point numbers."""
    return any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False))


def can_read(module: nn.Module, embedding: Tensor | None) -> bool:
    """Whether the lowest layers of ``module`` read embeddings and tell states row by row, as a run of them shows."""
    layers = layers_of(module)
    if not layers or embedding is None:
        return False
    if any(p.device.type == "meta" for p in module.parameters()) or any(map(is_quantised, module.modules())):
        return True  # nothing can run yet, or would pack weights, see evaluating
    tokens = torch.zeros(2, 3, embedding.shape[-1], device=embedding.device, dtype=embedding.dtype)
    try:
        with torch.no_grad():
            run_layers(module, ForwardState(), 1, tokens, torch.ones(2, 3, dtype=torch.bool, device=embedding.device))
    except Exception:  # of somebody's model, which may raise anything
        return False
    return True


def check_layer(module: nn.Module, layer: int | None) -> int:
    """The layer whose states tell prompts apart; raises [`SaptError`] if ``module`` has no such layer."""
    count = len(layers_of(module))
    if not count:
        raise SaptError(
            f"features='hidden' needs the layers of the base model, which a {type(module).__name__} does not tell: "
            "use features='both'."
        )
    if layer is not None and not 0 < layer <= count:
        raise SaptError(f"SaptConfig.features_layer is {layer}, the base model has layers 1 to {count}.")
    return default_layer(count) if layer is None else layer


def hidden_size(module: nn.Module) -> int | None:
    """Width of the hidden states of ``module``, as its config has it."""
    found = getattr(text_config(text_model(module)), "hidden_size", None)
    return found if isinstance(found, int) else None


def longest_prompt(module: nn.Module) -> int | None:
    """Positions that ``module`` has for a prompt, as its config has them; None if it does not say."""
    settings = text_config(text_model(module))
    found = (getattr(settings, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((count for count in found if isinstance(count, int) and count > 0), None)
