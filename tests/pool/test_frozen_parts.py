"""Old tasks' bytes are a promise: whoever opens what must not train is refused at the first forward with gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from helpers.tiny import build_pool, commit, labelled, token_rows
from helpers.training import arguments
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback
from peft_sapt.errors import TrainingError

TASKS = ["a", "b", "c"]
ROWS = token_rows([6, 9, 7])


def unfreeze(model, part: str = "sapt_") -> list[str]:
    """What a user does who wants "the adapter" trained; names of what this opened."""
    opened = []
    for name, parameter in model.named_parameters():
        if part in name and not parameter.requires_grad:
            parameter.requires_grad_(True)
            opened.append(name)
    return opened


def pool_with(block: str, router: str):
    model = build_pool("llama", TASKS, block=block, router=router)
    batch = labelled("llama", ROWS)
    model.commit_task([batch], replay=[batch])
    model.add_task("d")
    if router == "ridge":
        model.fit_router([batch])
    return model


PARTS = {
    ("lora", "attention"): ["sapt_", "sapt_old_A", "sapt_old_B", "sapt_old_keys", "sapt_targets", "sapt_replay"],
    ("prompt", "attention"): ["sapt_", "sapt_old_prompts", "sapt_old_keys"],
    ("lora", "ridge"): ["sapt_", "sapt_old_A", "sapt_old_means", "sapt_gram", "sapt_solved"],
    ("prompt", "ridge"): ["sapt_", "sapt_old_prompts", "sapt_mean", "sapt_temperatures"],
}


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("block, router, part", [(*kind, part) for kind, parts in PARTS.items() for part in parts])
def test_an_opened_part_is_refused_and_closed_again(block: str, router: str, part: str, mode: bool) -> None:
    model, batch = pool_with(block, router), labelled("llama", ROWS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert unfreeze(model, part)
    with pytest.raises(
        TrainingError, match=r"requires_grad=True, but holds what committed tasks have learned.*set_ad"
    ):
        model.train(mode)(**batch)
    with torch.no_grad():
        model(**batch)  # asking is no training
    model.base_model.set_adapter("default")  # the cure in the message
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "old" in n]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch).loss.backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        if "_old_" in key or "targets" in key or "replay" in key:
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_a_committed_task_that_is_opened(block: str) -> None:
    model = build_pool("llama", TASKS, block=block)
    commit(model)
    unfreeze(model)
    with pytest.raises(TrainingError, match="committed tasks"):
        model.train()(**labelled("llama", ROWS))
    model.base_model.set_adapter("default")
    with pytest.raises(TrainingError, match=r"'c' is committed.*reopen_task"):
        model(**labelled("llama", ROWS))


def test_under_the_trainer_nothing_moves(tmp_path) -> None:
    model = build_pool("llama", TASKS)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    unfreeze(model)
    for callbacks in ([], [ArmCallback(tokenizer(), replay="rows")]):
        run = Trainer(
            model, arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate, callbacks=callbacks
        )
        with pytest.raises((TrainingError, ValueError)):
            run.train()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_newest_block_and_the_base_may_be_opened_and_closed() -> None:
    """Only what is promised is guarded: what a user freezes of the rest, or trains of the base, is theirs."""
    model, batch = build_pool("llama", TASKS), labelled("llama", ROWS)
    for name, parameter in model.named_parameters():
        if "sapt_A" in name and "old" not in name:
            parameter.requires_grad_(False)
        if "norm" in name and "sapt" not in name:
            parameter.requires_grad_(True)
    model.train()(**batch).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "sapt_A" in n)
    assert any(p.grad is not None for n, p in model.named_parameters() if "norm" in n and "sapt" not in n)
