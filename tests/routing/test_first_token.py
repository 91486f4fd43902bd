"""A first token that a collator never supervises is no prompt: rows of nothing but text are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer

from helpers.tiny import build_pool, token_rows
from helpers.training import arguments, fresh_pool
from helpers.words import tokenizer
from peft_sapt import ArmCallback, PromptMaskCollator
from peft_sapt.errors import PromptError

TASKS = ["a", "b", "c"]
WANTED = r"supervised from their second token on.*completion-only loss.*sapt_prompt_mask"
BOS = 3


def rows(count: int, length: int = 7) -> list[dict[str, list[int]]]:
    return [{"input_ids": [BOS, *row, 2]} for row in token_rows([length] * count, seed=5)]


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("pad", ["<bos>", "<eos>"])
def test_full_text_collators_whose_padding_is_the_first_token(pad: str, router: str, tmp_path) -> None:
    words, model = tokenizer(), fresh_pool(router=router)
    words.pad_token = pad
    if pad == "<eos>":
        words.bos_token = "<eos>"
    collate = DataCollatorForLanguageModeling(words, mlm=False)
    data = [{"input_ids": [words.bos_token_id, *row["input_ids"][1:]]} for row in rows(16)]
    for callbacks in ([ArmCallback(words, replay="rows")], []):
        run = Trainer(model, arguments(tmp_path), train_dataset=data, data_collator=collate, callbacks=callbacks)
        with pytest.raises(PromptError, match=WANTED):
            if not callbacks and router == "ridge":
                model.fit_router([collate(data)])
            run.train()


@pytest.mark.parametrize("count", [1, 3])
def test_flattened_rows(count: int) -> None:
    batch = DataCollatorWithFlattening()(rows(count))
    model = build_pool("llama", TASKS).train()
    with pytest.raises(PromptError, match=r"supervised from (its start|their second token)"):
        model(**batch, use_cache=False)
    with pytest.raises(PromptError, match=r"supervised from (its start|their second token)"):
        PromptMaskCollator(DataCollatorWithFlattening())(rows(count))


def test_a_first_label_that_somebody_masked() -> None:
    model, ids = build_pool("llama", TASKS), torch.tensor(token_rows([8, 8, 8]))
    labels = ids.clone()
    labels[:, 0] = -100
    for mode in (True, False):
        with pytest.raises(PromptError, match=WANTED):
            model.train(mode)(input_ids=ids, labels=labels)
    with pytest.raises(PromptError, match=WANTED):
        PromptMaskCollator(lambda given: {"input_ids": ids, "labels": labels})([{}] * 3)


def test_short_prompts_are_prompts() -> None:
    model, ids = build_pool("llama", TASKS).train(), torch.tensor(token_rows([8, 8]))
    labels = ids.clone()
    labels[0, :1], labels[1, :3] = -100, -100
    model(input_ids=ids, labels=labels)  # beside longer ones
    model(input_ids=ids[:1], labels=labels[:1])  # alone: a question may be a word
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 0] = True
    model(input_ids=ids, labels=ids, sapt_prompt_mask=mask)  # who says so means it
