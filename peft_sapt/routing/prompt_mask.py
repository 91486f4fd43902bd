"""Which tokens of a batch are the prompt: the attended ones before the first supervised label, never an answer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import PromptError
from .notices import ANSWER_IN_QUERY, IGNORED_LABEL, PADDED, labels_left_out, padding_token, warn_once
from .turns import refuse_turns, until_first_answer


def prompt_mask_of(
    module: nn.Module,
    config: SaptConfig,
    inputs: dict[str, Any],
    shape: torch.Size,
    segments: Tensor | None,
    training: bool,
) -> Tensor:
    """Which tokens of a forward of ``module`` are the prompt, where ``sapt_prompt_mask`` does not say: [B, S], bool.

    Raises:
        PromptError: an attention mask of another rank, or a row whose labels leave no prompt.
    """
    ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
    settings = getattr(module, "config", None)
    if mask is not None and mask.dim() != 2:
        raise PromptError(
            f"attention_mask has {mask.dim()} dimensions, so the prompt cannot be read from it: "
            "pass sapt_prompt_mask=[B, S]."
        )
    if mask is not None:
        mask = mask.bool()
    elif ids is not None:
        dropped = generate_has_dropped_mask(module, inputs)
        mask = mask_in_place_of_none(module, ids, dropped)
        looks = not dropped and bool(mask.all()) and segments is None
        token = padding_token(ids, {0} | special_ids(settings)) if looks else None
        if token is not None:
            warn_once(module, PADDED.format(token=token))
    else:
        mask = torch.ones(shape, dtype=torch.bool, device=inputs["inputs_embeds"].device)
    if is_encoder_decoder(module) or not labels_follow_prompt(module, config):
        return mask
    if config.answer_header is not None:
        mask = until_first_answer(mask, ids, segments, config.answer_header)
    if labels is not None and labels.shape == mask.shape:
        if segments is None and config.answer_header is None:
            refuse_turns(mask, labels != IGNORED_LABEL, ids)
        return before_answers(mask, labels, segments, inputs, special_ids(settings))
    if labels is None and ids is not None:
        warn_of_answers(module, ids, training)
    return mask


def warn_of_answers(module: nn.Module, ids: Tensor, training: bool) -> None:
    """Say it once where a row without labels seems to hold an answer, which then is a part of the query."""
    if training:
        warn_once(module, ANSWER_IN_QUERY.format(what="Training"))
    elif labels_left_out(ids):
        warn_once(module, ANSWER_IN_QUERY.format(what="Evaluation"))


def inferred_mask(input_ids: Tensor, pad_token_id: int | None, eos_token_id: int | list[int] | None) -> Tensor:
    """The attention mask that ``generate`` would infer where none is given: [B, S], bool.

    Padding is recognised by its token, unless that token also ends a text; then everything counts as attended.
    """
    eos = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or [])
    if pad_token_id is None or pad_token_id in eos:
        return torch.ones_like(input_ids, dtype=torch.bool)
    return input_ids != pad_token_id


def mask_in_place_of_none(module: nn.Module, ids: Tensor, dropped: bool) -> Tensor:
    """The mask [B, S], bool, of a forward of ``module`` that was given none: of all ones if one was ``dropped``."""
    if dropped:
        return torch.ones_like(ids, dtype=torch.bool)
    settings = getattr(module, "config", None)
    return inferred_mask(ids, getattr(settings, "pad_token_id", None), getattr(settings, "eos_token_id", None))


def generate_has_dropped_mask(module: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a forward of ``module`` has no mask since ``generate`` dropped one of all ones (newer transformers do).

    There is one in the first place, inferred where a caller gave none. Such a forward asks for the last logits alone,
    says whether to use a cache, and its positions, if the model takes any, count up.
    """
    positions, kept = inputs.get("position_ids"), inputs.get("logits_to_keep")
    if inputs.get("attention_mask") is not None or not isinstance(kept, int) or kept != 1:
        return False
    if inputs.get("return_dict") is not True or inputs.get("use_cache") is None:
        return False
    if positions is None:
        return "position_ids" not in inspect.signature(module.forward).parameters
    return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())


def before_answers(
    mask: Tensor, labels: Tensor, segments: Tensor | None, inputs: Mapping[str, Any], special: set[int]
) -> Tensor:
    """``mask`` [B, S] cut before the first supervised label of each row, or of each sample of packed rows.

    Args:
        inputs: the batch, for what else tells that a row has no prompt.
        special: ids that are no prompt alone.

    Raises:
        PromptError: a row or a sample has labels and no prompt.
    """
    if segments is not None:
        return before_labels_in_segments(mask, labels, segments)
    prompt, ids = before_labels(mask, labels), inputs.get("input_ids")
    refuse_first_token_alone(prompt, labels, ids, special, flattened="position_ids" in inputs and ids is not None)
    return prompt


def before_labels(mask: Tensor, labels: Tensor) -> Tensor:
    """``mask`` [B, S] cut before the first supervised label of each row; ``labels`` [B, S] holds -100 elsewhere.

    Raises:
        PromptError: a row has supervised labels, but no attended token before the first one.
    """
    supervised = labels != IGNORED_LABEL
    prompt = mask & (supervised.cumsum(dim=1) == 0)
    empty = supervised.any(dim=1) & ~prompt.any(dim=1)
    if bool(empty.any()):
        rows = empty.nonzero().flatten().tolist()
        raise PromptError(
            f"Rows {rows} have labels but no prompt token before them, so there is nothing to compute their attention "
            "from. Set the labels of prompt tokens to -100, or mark the prompt with sapt_prompt_mask=[B, S], as "
            "PromptMaskCollator does from a column of the rows (with remove_unused_columns=False)."
        )
    return prompt


def refuse_first_token_alone(
    prompt: Tensor, labels: Tensor, ids: Tensor | None, special: set[int], flattened: bool
) -> None:
    """Refuse rows whose ``prompt`` [B, S] is a first token that a collator never supervises, and no prompt at all.

    Such a token is a special one, or all rows of a batch have just one, or the batch is one row of a collator that
    flattens several (which gives positions): all of the text is supervised then.

    Raises:
        PromptError: there are such rows.
    """
    single = (prompt.sum(dim=1) == 1) & (labels != IGNORED_LABEL).any(dim=1)  # [B]
    if not bool(single.any()):
        return
    known = torch.zeros_like(single)
    if ids is not None and special:
        marks = torch.tensor(sorted(special), device=ids.device)
        known = (torch.isin(ids, marks) & prompt).any(dim=1)
    thin = single & (known | (single.all() & (len(single) > 1 or flattened)))
    if bool(thin.any()):
        raise PromptError(
            f"Rows {thin.nonzero().flatten().tolist()[:10]} are supervised from their second token on, so their only "
            "prompt token is the first, which says nothing of them. Set the labels of prompt tokens to -100 "
            "(completion-only loss), or mark the prompt with sapt_prompt_mask=[B, S], as PromptMaskCollator does from "
            "a column of the rows (with remove_unused_columns=False)."
        )


def special_ids(settings: Any) -> set[int]:
    """Ids that begin, end or pad a text, as a model's config has them."""
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, name, None)
        found |= set(value) if isinstance(value, (list, tuple)) else {value} if isinstance(value, int) else set()
    return found


def before_labels_in_segments(mask: Tensor, labels: Tensor, segments: Tensor) -> Tensor:
    """``mask`` [B, S] cut before the first supervised label of each segment.

    Raises:
        PromptError: a segment has supervised labels but less than two prompt tokens before them. Collators of packed
            rows never supervise a sample's first token, so one such token is no sign of a prompt.
    """
    supervised = (labels != IGNORED_LABEL).flatten().long()
    flat, count = segments.flatten(), int(segments.max()) + 1
    seen = supervised.cumsum(0)
    earlier = torch.full((count,), len(seen), device=seen.device).scatter_reduce(0, flat, seen - supervised, "amin")
    prompt = mask & (seen == earlier[flat]).view_as(mask)
    tokens = torch.zeros(count, dtype=torch.long, device=seen.device).index_add(0, flat, prompt.flatten().long())
    labelled = torch.zeros_like(tokens).index_add(0, flat, supervised) > 0
    if bool((labelled & (tokens < 2)).any()):
        raise PromptError(
            "A packed sample is supervised from its start, so it has no prompt to compute attention from. Set the "
            "labels of prompt tokens to -100 (completion-only loss), or mark the prompt with sapt_prompt_mask=[B, S], "
            "as PromptMaskCollator does."
        )
    return prompt


def check_rows(mask: Tensor, training: bool) -> None:
    """Refuse an empty batch, and in training a row without any prompt token.

    In inference a row of nothing but padding is let through: its weights are uniform.
    """
    if mask.shape[1] == 0 or mask.shape[0] == 0:
        raise PromptError(f"The prompt is empty: input of shape {list(mask.shape)}. Give at least one token per row.")
    empty = ~mask.any(dim=1)
    if training and bool(empty.any()):
        raise PromptError(
            f"Rows {empty.nonzero().flatten().tolist()} have no prompt token (all padding, or masked out). "
            "Drop them from the training data."
        )


def labels_follow_prompt(module: nn.Module, config: SaptConfig) -> bool:
    """Whether labels continue the prompt, as for a decoder-only language model, or mark tokens of an encoder."""
    if config.task_type is not None:
        return config.task_type == "CAUSAL_LM"
    asked = getattr(module, "can_generate", None)
    return bool(asked()) if callable(asked) else True


def is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False)) and hasattr(
        module, "get_encoder"
    )
