"""A collator that marks the prompt, for training where the labels do not reach the model or do not tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import PromptError
from .routing.packing import segments_of
from .routing.prompt_mask import before_answers


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
