"""An optimizer that does not hold the block that is about to train is refused before the first step."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from helpers.training import arguments, fresh_pool
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, create_optimizer
from peft_sapt.errors import TrainingError


def kept_trainer(model, arm, folder) -> None:
    run = Trainer(model, arguments(folder), train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm])
    run.train()
    model.add_task("b")
    run.train_dataset = rows_of("b")
    run.train()


def kept_optimizer(model, arm, folder) -> None:
    args = arguments(folder)
    optimizers = create_optimizer(model, args)
    for task in ("a", "b"):
        if task not in model.tasks:
            model.add_task(task)
        Trainer(
            model, args, train_dataset=rows_of(task), data_collator=collate, callbacks=[arm], optimizers=optimizers
        ).train()


def one_block_left_out(model, arm, folder) -> None:
    groups = [p for n, p in model.named_parameters() if p.requires_grad and "q_proj" not in n]
    optimizers = (torch.optim.AdamW(groups), None)
    Trainer(
        model, arguments(folder), train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm],
        optimizers=optimizers,
    ).train()  # fmt: skip


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("habit", [kept_trainer, kept_optimizer, one_block_left_out])
def test_it_is_refused_and_named(habit, router: str, tmp_path) -> None:
    model, arm = fresh_pool(router=router), ArmCallback(tokenizer(), replay="rows", align_steps=2)
    with pytest.raises(TrainingError, match=r"optimizer does not hold .*sapt_A\.default.*Build a Trainer"):
        habit(model, arm, tmp_path)
    task = "a" if habit is one_block_left_out else "b"
    assert model.current_task == task not in model.committed_tasks
    Trainer(model, arguments(tmp_path), train_dataset=rows_of(task), data_collator=collate, callbacks=[arm]).train()
    assert task in model.committed_tasks
    assert any(bool(v.any()) for k, v in model.task_state(task).items() if "sapt_B" in k)


def test_what_a_user_froze_need_not_be_held(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="rows", align_steps=2)
    for name, parameter in model.named_parameters():
        if "query" in name:
            parameter.requires_grad_(False)
    Trainer(model, arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate, callbacks=[arm]).train()
    assert model.committed_tasks == ["a"]
