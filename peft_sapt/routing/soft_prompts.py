"""SAPT-Prompt: soft prompts of equal length as blocks, mixed by the shared attention and put before the input.

    P = sum_t w_t P_t,   P_t [P, d]   (SAPT, section 3.2, with prompts in place of LoRA)

A forward of the base model (or of its encoder) gets the mixed prompt [B, P, d] right before the first token of each
row, and a mask, positions and labels to match. Virtual tokens hold the positions 0..P-1 and the row's tokens follow;
padding on the left stays in front of both. So a row's result depends on that row alone, also where a window or a state
runs over it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import PromptError, SaptError, WeightsError
from ..pool_module import FreePoolModule, Linears, linear_from, unshard
from .caches import cache_among, is_filled, length_of, virtual_tokens
from .notices import IGNORED_LABEL
from .packing import segments_of
from .prompt_mask import generate_has_dropped_mask, mask_in_place_of_none


class Inserted(NamedTuple):
    """Where virtual tokens stand in a forward: before position ``first`` [B] of each row, in ``total`` positions."""

    first: Tensor
    total: int


class SoftPrompts(FreePoolModule):
    """Per adapter: ``sapt_prompt`` [P, d] of the newest task, and ``sapt_old_prompts`` [(T - 1) * P, d], frozen."""

    adapter_layer_names = ("sapt_prompt",)
    other_param_names = ("sapt_old_prompts",)
    stacks = {"sapt_prompt": "sapt_old_prompts"}
    sapt_prompt: Linears
    sapt_old_prompts: Linears

    def update_layer(self, adapter: str, config: SaptConfig, embedding: Tensor | None) -> None:
        """Build a prompt for each task in ``config``, out of the embeddings of random tokens."""
        if embedding is None:
            raise SaptError("block='prompt' needs a base model with token embeddings.")
        self.configs[adapter] = config
        *old, newest = [new_prompt(config, embedding) for _ in config.tasks]
        self.sapt_prompt[adapter] = linear_from(newest)
        if old:
            self.sapt_old_prompts[adapter] = linear_from(torch.cat(old))

    def part_sizes(self, config: SaptConfig) -> list[int]:
        return [config.num_virtual_tokens] * len(config.tasks)

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        return {"sapt_prompt": new_prompt(self.configs[adapter], self.hooks.base.get_input_embeddings().weight)}

    def init_from_mixture(self, adapter: str, shares: Tensor) -> None:
        newest = self.sapt_prompt[adapter].weight
        old = self.sapt_old_prompts[adapter].weight.float().view(len(shares), *newest.shape)  # [T - 1, P, d]
        newest.data.copy_(torch.einsum("t,tpd->pd", shares.to(old), old))

    def mixed(self, adapter: str, weights: Tensor) -> Tensor:
        """Weights [B, T] -> prompts [B, P, d] in float32."""
        if torch.is_grad_enabled():
            self.check_frozen(adapter)
        newest = unshard(self.sapt_prompt[adapter].weight)  # [P, d]
        parts = [unshard(self.sapt_old_prompts[adapter].weight)] if adapter in self.sapt_old_prompts else []
        prompts = torch.cat([*parts, newest]).float().view(weights.shape[-1], *newest.shape)  # [T, P, d]
        with torch.autocast(device_type=prompts.device.type, enabled=False):
            return torch.einsum("bt,tpd->bpd", weights, prompts)


def new_prompt(config: SaptConfig, embedding: Tensor) -> Tensor:
    """Embeddings of ``num_virtual_tokens`` random tokens, [P, d] in float32: soft prompts learn best from real ones.

    With ``init_weights=False`` they are random, for tests.
    """
    shape = config.num_virtual_tokens, config.token_dim or embedding.shape[-1]
    if embedding.device.type == "meta" or not config.init_weights:
        return torch.randn(shape, device=embedding.device)
    picked = torch.randint(len(embedding), (config.num_virtual_tokens,))
    return embedding.detach()[picked.to(embedding.device)].float().clone()


def prepend_prompt(
    module: nn.Module,
    mixed: Callable[[], Tensor],
    length: int,
    inputs: dict[str, Any],
    encoder_decoder: bool,
    generates: bool = False,
    off: Tensor | None = None,
) -> tuple[dict[str, Any], Inserted | None]:
    """The arguments of a forward with the prompt ``mixed()`` [B, P, d] in front, P = ``length``, and where it stands,
    if its logits are to be cut out.

    ``inputs`` are all arguments by name. Later forwards on a cache that begins with the virtual tokens get mask and
    positions alone; so does the decoder of an encoder-decoder, whose encoder outputs begin with them.

    Args:
        generates: the forward is one of a ``generate`` under way, which has a mask for a decoder-only model, but may
            drop one of all ones.
        off: rows whose virtual tokens are masked, [B], bool, so that they are answered as without any.

    Raises:
        PromptError: packed rows, or a mask of more than two dimensions.
        WeightsError: a filled cache that does not begin with virtual tokens.
    """
    changed = dict(inputs)
    mask = inputs.get("attention_mask")
    off = None if off is None or not bool(off.any()) else off
    if mask is not None and mask.dim() != 2:
        raise PromptError(f"attention_mask has {mask.dim()} dimensions: soft prompts need a mask [B, S].")
    encoded = inputs.get("encoder_outputs")
    if encoder_decoder and encoded is not None:
        if mask is not None and encoded[0].shape[1] == mask.shape[1] + length:
            changed["attention_mask"] = longer_mask(mask, length, off, at_end=True)
        return changed, None
    ids, (name, cache) = inputs.get("input_ids"), cache_among(inputs)
    takes = inspect.signature(module.forward).parameters
    if not encoder_decoder and is_filled(cache):
        if virtual_tokens(cache) != length:
            raise WeightsError(
                f"{name} was filled without this pool's soft prompts: start from the whole prompt, without it."
            )
        width = (ids if ids is not None else inputs["inputs_embeds"]).shape[1]
        if mask is None and off is not None and length_of(cache) >= length:  # a state has let go of what it read
            mask = torch.ones(len(off), length_of(cache) - length + width, dtype=torch.long, device=off.device)
        if mask is not None:
            changed["attention_mask"] = longer_mask(mask, length, off)
            changed.update(positions(takes, inputs, mask, changed["attention_mask"], length, width, off))
        elif inputs.get("position_ids") is not None:
            changed["position_ids"] = inputs["position_ids"] + length
        return changed, None
    if segments_of(inputs) is not None:
        raise PromptError("Packed rows are not supported with block='prompt': switch packing off.")
    embeddings = inputs.get("inputs_embeds")
    if embeddings is None:
        embeddings = module.get_input_embeddings()(ids)  # type: ignore[operator]  # [B, S, d]
    width = embeddings.shape[1]
    if mask is None and ids is not None:
        dropped = not encoder_decoder and (generates or generate_has_dropped_mask(module, inputs))
        mask = mask_in_place_of_none(module, ids, dropped).long()
    elif mask is None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    changed.pop("input_ids", None)
    first = first_of(mask, off if encoder_decoder else None)
    changed["inputs_embeds"] = insert_at(first, mixed().to(embeddings), embeddings)  # [B, P + S, d]
    changed["attention_mask"] = longer_mask(mask, length, off, at_end=encoder_decoder)
    if encoder_decoder:
        return changed, None
    changed.update(positions(takes, inputs, mask, changed["attention_mask"], length, length + width, off))
    labels, kept = inputs.get("labels"), inputs.get("logits_to_keep")
    if labels is not None and labels.shape[1:2] == (width,):
        changed["labels"] = insert_at(first, labels.new_full((len(labels), length), IGNORED_LABEL), labels)
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        changed["logits_to_keep"] = nn.functional.pad(kept, (length, 0))
    elif isinstance(kept, Tensor):
        changed["logits_to_keep"] = torch.where(kept < 0, kept, kept + length)
    elif isinstance(kept, int) and kept > width:
        changed["logits_to_keep"] = 0  # all of them
    return changed, Inserted(first, length + width)


def first_of(mask: Tensor, at_end: Tensor | None = None) -> Tensor:
    """The first position that ``mask`` [B, S] has in each row, or in rows ``at_end`` the one behind the last: [B]."""
    first = mask.bool().int().argmax(dim=1)
    return first if at_end is None else first.masked_fill(at_end, mask.shape[1])


def longer_mask(mask: Tensor, length: int, off: Tensor | None = None, at_end: bool = False) -> Tensor:
    """``mask`` [B, S] with ``length`` virtual tokens: [B, P + S]; in rows ``off`` [B] they are masked, and stand at
    the end where a model counts positions by itself (``at_end``)."""
    front = mask.new_ones(len(mask), length)
    if off is not None:
        front = front.masked_fill(off.unsqueeze(1), 0)
    return insert_at(first_of(mask, off if at_end else None), front, mask)


def insert_at(first: Tensor, front: Tensor, tensor: Tensor) -> Tensor:
    """``front`` [B, P, ...] put into ``tensor`` [B, S, ...] before position ``first`` [B]."""
    length, both = front.shape[1], torch.cat([front, tensor], dim=1)
    first = first.unsqueeze(1)  # [B, 1]
    places = torch.arange(both.shape[1], device=first.device).expand(len(both), -1)
    source = torch.where(places < first, places + length, torch.where(places < first + length, places - first, places))
    return both[torch.arange(len(both), device=first.device).unsqueeze(1), source]


def positions(
    takes: Any,
    inputs: dict[str, Any],
    mask: Tensor,
    longer: Tensor,
    length: int,
    width: int,
    off: Tensor | None = None,
) -> dict[str, Tensor]:
    """Positions of the last ``width`` tokens of rows with virtual ones: those given, moved, or those of the mask.

    Args:
        mask, longer: without the virtual tokens, and with them.
        off: rows that count as without them, [B].
    """
    if "position_ids" not in takes:
        return {}
    given = inputs.get("position_ids")
    if given is None:
        return {"position_ids": (longer.long().cumsum(dim=1) - 1).clamp(min=0)[:, -width:]}
    moved = given + length
    if off is not None:
        moved = torch.where(off.unsqueeze(1), given, moved)
    if width > given.shape[-1]:
        rows = moved.expand(*moved.shape[:-2], len(mask), -1).reshape(-1, len(mask), moved.shape[-1])  # [n, B, S]
        steps = torch.arange(-length, 0, device=moved.device)
        starts = rows.gather(2, first_of(mask).view(1, -1, 1).expand(len(rows), -1, 1))  # [n, B, 1]
        first = first_of(mask)
        before = (starts + steps).clamp(min=0)
        moved = torch.stack([insert_at(first, b, each) for b, each in zip(before, rows, strict=True)])
        moved = moved.reshape(*given.shape[:-2], len(mask), width)
    return {"position_ids": moved}


def strip_prompt(output: Any, length: int, inserted: Inserted) -> Any:
    """``output`` with its logits cut to the tokens of the caller: [B, P + S, V] -> [B, S, V]."""
    first, total = inserted
    padded = bool(first.any())

    def cut(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == total):
            return value
        if not padded or len(first) != len(value):
            return value[:, length:]
        places = torch.arange(total - length, device=value.device).expand(len(value), -1)  # [B, S]
        places = torch.where(places < first.to(value.device).unsqueeze(1), places, places + length)
        return value.gather(1, places.unsqueeze(-1).expand(-1, -1, value.shape[-1]))

    if isinstance(output, tuple):
        return tuple(cut(value) for value in output)
    for name in ("logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            output[name] = cut(output[name])
    return output
