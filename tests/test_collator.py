"""PromptMaskCollator: it marks prompts in any batch, and refuses what it cannot tell."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny import padded
from peft_sapt import PromptMaskCollator
from peft_sapt.errors import PromptError


def test_prompt_masks_for_encoder_decoders_and_classes() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 2]}, {"input_ids": [5, 6], "labels": [9, 2]}]

    def labels_of(picked):
        return {**padded([r["input_ids"] for r in picked]), "labels": torch.tensor([r["labels"] for r in picked])}

    batch = PromptMaskCollator(labels_of)(rows)
    assert torch.equal(batch["sapt_prompt_mask"], batch["attention_mask"].bool())
    same = [{"input_ids": [5, 6], "labels": [8, 2]}] * 2
    assert PromptMaskCollator(labels_of, encoder_decoder=True)(same)["sapt_prompt_mask"].all()


def test_a_mask_of_another_length_is_refused() -> None:
    rows = [{"input_ids": [5, 6, 7], "sapt_prompt_mask": [1, 0]}]
    with pytest.raises(PromptError, match="3 tokens and a prompt mask of 2"):
        PromptMaskCollator(lambda picked: {"input_ids": torch.tensor([r["input_ids"] for r in picked])})(rows)
    with pytest.raises(PromptError, match="Only 1 of 2"):
        PromptMaskCollator(lambda picked: {"input_ids": torch.tensor([[5, 6, 7]] * 2)})([*rows, {"input_ids": [1]}])
    with pytest.raises(PromptError, match="neither labels"):
        PromptMaskCollator(lambda picked: {"input_ids": torch.tensor([[5, 6, 7]])})([{"input_ids": [5, 6, 7]}])
