"""An optimizer that does not hold the block that is about to train is refused before the first step."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from peft.optimizers import create_loraplus_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from transformers import Trainer
from transformers.optimization import Adafactor

from helpers.training import arguments, fresh_pool
from helpers.words import collate, rows_of, tokenizer
from peft_sapt import ArmCallback, SaptConfig, create_optimizer, optimizer_groups
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


# --- loops without the callback --------------------------------------------------------------------------------------


def batch_for(task: str) -> dict[str, torch.Tensor]:
    return collate(rows_of(task[0])[:8])


def train(model, optimizer, task: str, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        model(**batch_for(task)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def opened(router: str, block: str, task: str = "a"):
    model = fresh_pool(router=router, **({"block": block, "num_virtual_tokens": 4} if block == "prompt" else {}))
    return open_for(model, task)


def open_for(model, task: str):
    if task not in model.tasks:
        model.add_task(task)
    if not model.base_model.router.needs_replay:
        model.fit_router([batch_for(task)])
    return model


def plain(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sgd(model):
    return torch.optim.SGD(optimizer_groups(model, lr=1e-2), momentum=0.9)


def two_of_them(model):
    """Blocks and attention each have an optimizer of their own; steps are taken by both."""
    blocks, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (blocks if ".sapt_A." in name or ".sapt_B." in name or "prompt" in name else rest).append(parameter)
    optimizers = [torch.optim.AdamW(group, lr=1e-2) for group in (blocks, rest) if group]

    class Both:
        def step(self) -> None:
            for optimizer in optimizers:
                optimizer.step()

        def zero_grad(self) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()

    return Both()


def prepared(model):
    return Accelerator(cpu=True).prepare(plain(model))


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
@pytest.mark.parametrize("build", [plain, sgd, two_of_them, prepared])
def test_a_loop_with_a_kept_optimizer_is_stopped_before_its_first_step(build, block: str, router: str) -> None:
    model = opened(router, block)
    optimizer = build(model)
    train(model, optimizer, "a")
    open_for(model, "b")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"no longer in the model.*sapt_.*would not be trained.*Build a new opt"):
        train(model, optimizer, "b")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    train(model, build(model), "b")
    model.commit_task()
    assert model.committed_tasks == ["a", "b"]


def test_the_trainer_without_the_callback(tmp_path) -> None:
    model = fresh_pool()
    run = Trainer(model, arguments(tmp_path), train_dataset=rows_of("a"), data_collator=collate)
    run.train()
    model.add_task("b")
    run.train_dataset = rows_of("b")
    with pytest.raises(TrainingError, match="no longer in the model"):
        run.train()


@pytest.mark.parametrize("change", ["remove", "import"])
def test_other_changes_that_replace_parameters(change: str, tmp_path) -> None:
    model = opened("attention", "lora")
    train(model, plain(model), "a")
    model.add_task("b")
    optimizer = plain(model)
    train(model, optimizer, "b")
    if change == "remove":
        model.remove_task("b")
        model.reopen_task()
    else:
        model.export_task("a", tmp_path)
        model.import_task("b", tmp_path)
    with pytest.raises(TrainingError, match="no longer in the model"):
        train(model, optimizer, model.current_task)


def test_a_group_added_for_the_new_block_is_enough() -> None:
    model = opened("attention", "lora")
    optimizer = plain(model)
    train(model, optimizer, "a")
    model.add_task("b")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad and id(p) not in held]})
    train(model, optimizer, "b")
    model.commit_task()
    assert any(bool(v.any()) for k, v in model.task_state("b").items() if "sapt_B" in k)


def test_optimizers_of_others_are_in_nobodys_way() -> None:
    model = opened("attention", "lora")
    optimizer, other = plain(model), torch.nn.Linear(3, 2)
    train(model, optimizer, "a")
    model.add_task("b")
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    foreign.step()
    train(model, plain(model), "b")


# --- a block that nothing moved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_a_block_that_no_optimizer_held_is_not_committed(block: str, router: str) -> None:
    """Built before the pool was put on the model, so that it never held a parameter of it."""
    model = opened(router, block)
    base = [p for n, p in model.named_parameters() if "sapt_" not in n]
    train(model, torch.optim.AdamW(base, lr=1e-3), "a")
    for commit in (model.commit_task, lambda: model.commit_task([batch_for("a")])):
        with pytest.raises(TrainingError, match=r"'a' is not committed.*none of them held it"):
            commit()
    assert model.committed_tasks == []
    train(model, plain(model), "a")
    model.commit_task()


def test_a_loop_of_arm_with_such_a_block() -> None:
    model, arm = opened("attention", "lora"), ArmCallback(tokenizer(), replay="rows", align_steps=2)
    arm.prepare(model, [batch_for("a")])
    train(model, torch.optim.AdamW([p for n, p in model.named_parameters() if "sapt_" not in n]), "a")
    with pytest.raises(TrainingError, match="none of them held it"):
        arm.reflect(model)


def test_blocks_moved_by_hand_or_by_nobody_are_committed() -> None:
    model = opened("attention", "lora")
    model.train()(**batch_for("a")).loss.backward()
    model.commit_task()  # no optimizer took a step: nobody meant to train it
    model.add_task("b")
    model(**batch_for("b")).loss.backward()
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1).step()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.commit_task()
    assert model.committed_tasks == ["a", "b"]


def test_training_is_not_forgotten_by_what_comes_after_it() -> None:
    """A last loss, and steps of something else, between the training and the commit."""
    model = opened("attention", "lora")
    train(model, plain(model), "a")
    model.train()(**batch_for("a"))
    probe = torch.nn.Linear(3, 3)
    probe(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD(probe.parameters(), lr=0.1).step()
    model.commit_task()
    assert model.committed_tasks == ["a"]


@pytest.mark.parametrize("router_alone", [True, False])
def test_an_imported_block_need_not_move(router_alone: bool, tmp_path) -> None:
    model = opened("attention", "lora")
    train(model, plain(model), "a")
    model.export_task("a", tmp_path)
    model.import_task("b", tmp_path)
    picked = [
        p for n, p in model.named_parameters() if p.requires_grad and ("sapt_A" in n or "sapt_B" in n) != router_alone
    ]
    train(model, torch.optim.AdamW(picked, lr=1e-3), "b")
    model.commit_task()
    assert model.committed_tasks == ["a", "b"]


@pytest.mark.parametrize("which", ["copied model", "pool that was switched off"])
def test_an_optimizer_of_another_pool_hides_nothing(which: str) -> None:
    model = opened("attention", "lora")
    if which == "copied model":
        optimizer = plain(model)
        kept, model = model, copy.deepcopy(model)
        train(model, optimizer, "a")
        with pytest.raises(TrainingError, match="none of them held it"):
            model.commit_task()
        assert kept.tasks == ["a"]
        return
    model.add_adapter("two", SaptConfig(task_type="CAUSAL_LM", task_name="c"))
    held = [p for p in model.parameters() if p.requires_grad]
    model.set_adapter("two")
    optimizer = torch.optim.AdamW(held + [p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.set_adapter("default")
    train(model, optimizer, "a")
    model.add_task("b")
    model.set_adapter("two")
    train(model, optimizer, "c")
    model.set_adapter("default")
    with pytest.raises(TrainingError, match="no longer in the model"):
        train(model, optimizer, "b")


@pytest.mark.parametrize("build", [
    lambda ps: Adafactor(ps, lr=None, relative_step=True, scale_parameter=True, warmup_init=True),
    lambda ps: torch.optim.AdamW([{"params": ps}, {"params": []}], lr=1e-3),
    lambda ps: torch.optim.SGD(ps, lr=torch.tensor(1e-3)),
])  # fmt: skip
def test_optimizers_of_other_shapes(build) -> None:
    model = opened("attention", "lora")
    train(model, build([p for p in model.parameters() if p.requires_grad]), "a")
    model.commit_task()


# --- helpers that pick by name ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("helper", ["LoRA+", "LoRA-FA"])
def test_helpers_that_look_for_loras_names_are_refused(helper: str) -> None:
    model = opened("attention", "lora")
    if helper == "LoRA+":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    else:
        optimizer = LoraFAOptimizer(params=[{"params": [p for p in model.parameters() if p.requires_grad]}])
    with pytest.raises(TrainingError, match=r"LoRA's names.*optimizer_groups\(model, lr, b_lr_ratio"):
        train(model, optimizer, "a")


def test_a_group_that_stays_empty_is_told() -> None:
    """It may be one for a head that is not there, or for a ``lora_B`` that was not found."""
    model = opened("attention", "lora")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if ("lora_B" in n) == fast], "lr": lr}
              for fast, lr in ((False, 1e-3), (True, 1e-2))]  # fmt: skip
    with pytest.warns(UserWarning, match=r"empty parameter group.*b_lr_ratio"):
        train(model, torch.optim.AdamW(groups), "a")


def test_groups_with_a_ratio_of_our_own(tmp_path) -> None:
    """LoRA+: B at 16 times the rate of A, by the groups, by the Trainer's optimizer, and in what moves."""
    model = opened("attention", "lora")
    groups = {g["name"]: g for g in optimizer_groups(model, lr=1e-3, attention_lr=3e-4, b_lr_ratio=16)}
    named = {id(p): n for n, p in model.named_parameters()}
    assert groups["blocks_b"]["lr"] == pytest.approx(16e-3) and groups["blocks"]["lr"] == 1e-3
    assert all(".sapt_B." in named[id(p)] for p in groups["blocks_b"]["params"])
    assert all(".sapt_A." in named[id(p)] for p in groups["blocks"]["params"])
    optimizer, _ = create_optimizer(model, arguments(tmp_path, learning_rate=1e-3), b_lr_ratio=16)
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates["blocks_b"] == pytest.approx(16e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, optimizer, "a", steps=1)  # AdamW's first step has the size of the rate where a gradient is
    moved = {n: float((p - before[n]).abs().max()) for n, p in model.named_parameters() if n in before}
    assert max(v for n, v in moved.items() if ".sapt_B." in n) == pytest.approx(16e-3, rel=1e-2)
    assert "blocks_b" not in [g["name"] for g in optimizer_groups(model, lr=1e-3)]
