"""From rows to batches for the Trainer: rows in the shapes that people have, as token ids and labels; and a collator
that marks the prompt, where the labels do not reach the model or do not tell it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PromptError
from .routing.notices import IGNORED_LABEL
from .routing.packing import segments_of
from .routing.prompt_mask import before_answers

SHAPES = (
    "{'prompt': str, 'completion': str}, {'messages': [...]} that end with the assistant's, or {'input_ids': [...], "
    "'labels': [...]}"
)


class PromptMaskCollator:
    """Adds ``sapt_prompt_mask`` [B, S] to the batches of another collator.

    Needed with label smoothing, ``compute_loss_func`` or a loss of your own, where the Trainer keeps the labels from
    the model, and with a loss on the full sequence, where labels begin at the first token. The mask comes from the
    rows, if they have the column ``sapt_prompt_mask`` (1 on prompt tokens) or TRL's ``completion_mask`` (0 on them),
    otherwise from the labels of the batch. Padding on either side and padding-free batches (all rows in one) are
    recognised. For an encoder-decoder say ``encoder_decoder=True``: its whole input is prompt, whatever the labels.

    Give it to the Trainer (or TRL's SFTTrainer) as ``data_collator=PromptMaskCollator(collator)``. Columns of rows
    reach a collator only with ``TrainingArguments(remove_unused_columns=False)``.

    Raises:
        PromptError: on a call: some rows have a mask and others do not, a mask has another length than its row's
            tokens, or there is neither a mask nor labels.
    """

    def __init__(
        self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], encoder_decoder: bool = False
    ) -> None:
        self.collator, self.encoder_decoder = collator, encoder_decoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        masks = [_mask_of(row) for row in rows]
        plain = [{k: v for k, v in row.items() if k != "sapt_prompt_mask"} for row in rows]
        batch = self.collator(plain)
        given = [mask for mask in masks if mask is not None]
        if len(given) not in (0, len(rows)):
            raise PromptError(f"Only {len(given)} of {len(rows)} rows have a prompt mask: give all of them one.")
        if given:
            batch["sapt_prompt_mask"] = self.laid_out(given, batch)
        elif self.encoder_decoder or "decoder_input_ids" in batch:
            batch["sapt_prompt_mask"] = attended_of(batch)
        else:
            batch["sapt_prompt_mask"] = self.from_labels(batch)
        return batch

    @staticmethod
    def laid_out(masks: list[list[bool]], batch: dict[str, Any]) -> Tensor:
        """``masks`` in the places that the collator gave their rows' tokens."""
        shape = batch["input_ids"].shape
        result = torch.zeros(shape, dtype=torch.bool)
        places = attended_of(batch)
        flattened = shape[0] == 1 and len(masks) > 1
        if flattened:  # padding-free: all rows one after another
            masks = [[value for mask in masks for value in mask]]
        for i, mask in enumerate(masks):
            slots = places[i].nonzero().flatten()
            if batch.get("attention_mask") is None and (flattened or "position_ids" in batch):
                slots = slots[: len(mask)]  # packed rows without a mask are padded at their end
            if len(slots) != len(mask):
                raise PromptError(
                    f"Row {i} of a batch has {len(slots)} tokens and a prompt mask of {len(mask)}: give one entry per "
                    "token of input_ids."
                )
            result[i, slots] = torch.tensor(mask)
        return result

    @staticmethod
    def from_labels(batch: dict[str, Any]) -> Tensor:
        labels = batch.get("labels")
        if labels is None:
            raise PromptError(
                "PromptMaskCollator found neither labels in the batch nor a column sapt_prompt_mask or "
                "completion_mask in the rows: give one of them. (A Trainer drops such columns unless "
                "remove_unused_columns=False.)"
            )
        mask = attended_of(batch)
        if labels.shape != mask.shape:  # of a class, or of a decoder: the whole input is prompt
            return mask
        return before_answers(mask, labels, segments_of(batch), batch, special=set())


def attended_of(batch: dict[str, Any]) -> Tensor:
    """Attended tokens of a batch, [B, S]; all of them where no mask is given."""
    mask = batch.get("attention_mask")
    return torch.ones(batch["input_ids"].shape, dtype=torch.bool) if mask is None else mask.bool()


def _mask_of(row: dict[str, Any]) -> list[bool] | None:
    if row.get("sapt_prompt_mask") is not None:
        return [bool(value) for value in row["sapt_prompt_mask"]]
    if row.get("completion_mask") is not None:
        return [not value for value in row["completion_mask"]]
    return None


# --- rows ------------------------------------------------------------------------------------------------------------


def training_rows(tokenizer: Any, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, list[int]]]:
    """``rows`` as ``{"input_ids": [S], "labels": [S]}`` for a causal language model, for the Trainer with
    ``DataCollatorForSeq2Seq(tokenizer)``. (TRL's SFTTrainer takes the first two shapes as they are.)

    Args:
        tokenizer: of the base model, with an end token, which ends each answer; for messages with a chat template.
        rows: of any of these shapes, other keys are ignored. ``prompt`` and ``completion``: texts, joined as they are.
            ``messages``: a chat; the last answer is learned, all before it is prompt. ``input_ids`` and ``labels``,
            -100 on the prompt: checked, and passed on.

    Raises:
        PromptError: a row has none of the shapes, no prompt, or no answer; it says which row.
    """
    if isinstance(rows, (str, Mapping)):
        raise PromptError(f"Rows must be a list of rows, or one split of a dataset, got a {type(rows).__name__}.")
    if tokenizer.eos_token_id is None:
        raise PromptError("The tokenizer has no end token, which ends each answer: set tokenizer.eos_token.")
    return [checked_row(number, encoded_row(tokenizer, number, row)) for number, row in enumerate(rows)]


def encoded_row(tokenizer: Any, number: int, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row."""
    if not isinstance(row, Mapping):
        raise PromptError(f"Row {number} is a {type(row).__name__}: it must be {SHAPES}.")
    if "input_ids" in row and "labels" in row:
        try:
            return [int(i) for i in row["input_ids"]], [int(i) for i in row["labels"]]
        except (TypeError, ValueError) as error:
            raise PromptError(f"Row {number}: input_ids and labels must be lists of numbers ({error}).") from error
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt = list(tokenizer(row["prompt"]).input_ids)
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # that some tokenizers append
            prompt.pop()
        answer = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if not row["completion"].strip():
            answer = []
        return prompt + answer, [IGNORED_LABEL] * len(prompt) + answer
    if "messages" in row:
        return encoded_chat(tokenizer, number, row["messages"])
    raise PromptError(f"Row {number} has the keys {sorted(row)}: it must be {SHAPES}.")


def encoded_chat(tokenizer: Any, number: int, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat, in the tokenizer's template."""
    turns = messages if isinstance(messages, (list, tuple)) and all(isinstance(m, Mapping) for m in messages) else ()
    last = turns[-1] if turns else {}
    if last.get("role") != "assistant" or not str(last.get("content") or "").strip():
        raise PromptError(
            f"The messages of row {number} do not end with the assistant's, which is to be learned: they must be a "
            'list of {"role": ..., "content": ...}, the last one with an answer.'
        )
    if len(turns) == 1:
        raise PromptError(f"Row {number} has no prompt: its only message is the assistant's.")
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "The tokenizer has no chat template, by which messages become text: give prompt and completion."
        )
    asked = tokenizer.apply_chat_template(list(messages[:-1]), add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(list(messages), tokenize=False)
    if not whole.startswith(asked):
        raise PromptError(
            f"In row {number} the chat template writes the messages before the answer otherwise than without it, so "
            "prompt and answer cannot be told apart: give prompt and completion."
        )
    prompt = list(tokenizer(asked, add_special_tokens=False).input_ids)
    answer = list(tokenizer(whole[len(asked) :], add_special_tokens=False).input_ids)
    if not set(answer) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}):
        answer.append(tokenizer.eos_token_id)  # a template need not write one
    return prompt + answer, [IGNORED_LABEL] * len(prompt) + answer


def checked_row(number: int, row: tuple[list[int], list[int]]) -> dict[str, list[int]]:
    """The row as the Trainer takes it."""
    ids, labels = row
    if len(ids) != len(labels):
        raise PromptError(f"Row {number} has {len(ids)} input_ids and {len(labels)} labels.")
    first = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), None)
    if first is None:
        raise PromptError(f"Row {number} has no answer: all of its labels are -100, or its completion is empty.")
    if first == 0:
        raise PromptError(
            f"Row {number} has no prompt, from which its attention could be computed: labels begin at once."
        )
    return {"input_ids": ids, "labels": labels}
