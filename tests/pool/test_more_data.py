"""More data for a task later: a block of its own that starts as a copy, or the old block on old rows and new ones."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from helpers.tiny import build_pool, commit, token_rows
from helpers.training import fresh_pool, trainer
from helpers.words import tokenizer
from peft_sapt import ArmCallback, GeneratorSettings
from peft_sapt.arm.old_rows import KEPT, digests
from peft_sapt.errors import ReflectionError, TaskError

BLOCKS = ({}, {"router": "ridge"}, {"block": "prompt", "num_virtual_tokens": 3}, {"use_rslora": True})


def ids(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(seed))


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def moved_between(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> list[str]:
    """Names of what has changed; of the targets by more than the rounding of a removal."""
    close = {name: torch.allclose(now[name], value, atol=1e-6) for name, value in before.items() if "targets" in name}
    return [name for name, value in before.items() if not close.get(name, torch.equal(now[name], value))]


@pytest.mark.parametrize("fields", BLOCKS, ids=str)
@pytest.mark.parametrize("name", ["a", "b"], ids=["an older task", "the newest"])
def test_a_continued_task_starts_as_a_copy(fields, name: str) -> None:
    model = build_pool("llama", ["a", "b"], **fields).eval()
    commit(model)
    with torch.no_grad():
        before = model(input_ids=ids(1), sapt_task=name).logits
    kept = [{key: value.clone() for key, value in model.task_state(task).items()} for task in ("a", "b")]
    assert model.continue_task(name) == f"{name}-2"
    assert model.tasks == ["a", "b", f"{name}-2"] and model.committed_tasks == ["a", "b"]
    with torch.no_grad():
        after = model(input_ids=ids(1), sapt_task=f"{name}-2").logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    for task, parts in zip(("a", "b"), kept, strict=True):
        now = model.task_state(task)
        assert all(torch.equal(now[key], value) for key, value in parts.items())
    assert any(p.requires_grad for p in model.parameters())


def test_names_of_continued_tasks() -> None:
    model = fresh_pool()
    commit(model)
    assert model.continue_task("a") == "a-2"
    commit(model)
    assert model.continue_task("a") == "a-3"
    commit(model)
    assert model.continue_task("a-2", "tickets of May") == "tickets of May"
    commit(model)
    before = model.tasks
    for arguments in (("nobody",), ("a", "a-2"), ("a", "with/slash")):
        with pytest.raises(TaskError):
            model.continue_task(*arguments)
        assert model.tasks == before


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_new_rows_alone_are_refused_for_a_reopened_task(tmp_path, router: str) -> None:
    model, arm = fresh_pool(router=router), ArmCallback(tokenizer())
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    trainer(model, tmp_path, "b", [arm]).train()
    before = snapshot(model)
    model.reopen_task()
    said = r"'b' was opened again, and none of .*continue_task\('b'\).*forget=True"
    with pytest.raises(ReflectionError, match=said):
        trainer(model, tmp_path, "c", [arm]).train()
    assert model.committed_tasks == ["a"]
    assert model.continue_task("b") == "b-2" and model.committed_tasks == ["a", "b"]
    trainer(model, tmp_path, "c", [arm]).train()
    model.remove_task("b-2", forget=True)
    now = snapshot(model)
    moved = moved_between(before, now)
    # shared by all tasks: projection or sums of the router, and what tells strangers
    shared = ("query", "detector", "limits", "background", "sapt_gram", "sapt_solved", "temperatures")
    assert [name for name in moved if not any(word in name for word in shared)] == []


def test_old_rows_among_the_new_ones_are_enough(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    first = trainer(model, tmp_path, "a", [arm])
    first.train()
    record = model.peft_config["default"].records["a"]["prompts"].split()
    assert 0 < len(record) <= KEPT and sorted(record) == record
    model.save_pretrained(tmp_path / "pool")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "pool", is_trainable=True)
    loaded.reopen_task()
    mixed = trainer(loaded, tmp_path, "c", [arm])
    mixed.train_dataset = torch.utils.data.ConcatDataset([mixed.train_dataset, first.train_dataset])
    mixed.train()
    assert loaded.committed_tasks == ["a"]
    again = loaded.peft_config["default"].records["a"]["prompts"].split()
    assert again[:3] != record[:3] or set(again) & set(record)


def test_a_task_that_may_forget_takes_new_rows_alone(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    trainer(model, tmp_path, "a", [arm]).train()
    model.reopen_task(forget=True)
    trainer(model, tmp_path, "c", [arm]).train()
    assert model.committed_tasks == ["a"]


@pytest.mark.parametrize("replay", ["statistics", "rows"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_task_that_was_opened_for_nothing_is_closed_as_it_was(tmp_path, replay: str, times: int) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay=replay)
    for name in ("a", "b"):
        if name not in model.tasks:
            model.add_task(name)
        trainer(model, tmp_path, name, [arm]).train()
    before, rows = snapshot(model), list(model.peft_config["default"].replay_rows)
    for _ in range(times):
        model.reopen_task()
    assert model.committed_tasks == ["a"]
    model.add_task("c")
    assert model.peft_config["default"].replay_rows == [*rows, 0]
    model.remove_task("c")
    now = snapshot(model)
    assert before.keys() == now.keys()
    assert moved_between(before, now) == []
    model.continue_task("b")
    trainer(model, tmp_path, "c", [arm]).train()
    model.save_pretrained(tmp_path / "pool")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "pool")
    assert loaded.committed_tasks == ["a", "b", "b-2"]


def test_opening_a_task_that_is_open_changes_nothing() -> None:
    model = fresh_pool()
    before = snapshot(model)
    model.reopen_task()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TaskError, match="no training prompt of it is known"):
        model.add_task("b")


def test_an_older_task_that_goes_meanwhile_is_no_trouble() -> None:
    model = build_pool("llama", ["a", "b", "c"])
    commit(model)
    model.reopen_task()
    model.remove_task("a")
    with pytest.raises(TaskError, match="no training prompt of it is known"):
        model.add_task("d")  # what was remembered was of three tasks
    commit(model)
    model.add_task("d")
    assert model.committed_tasks == ["b", "c"]


@pytest.mark.parametrize("fields", BLOCKS[:3], ids=str)
def test_a_warm_start_leaves_the_copy(tmp_path, fields) -> None:
    model, arm = fresh_pool(**fields), ArmCallback(tokenizer(), warm_start=True)
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    trainer(model, tmp_path, "b", [arm]).train()
    model.continue_task("a")
    with pytest.raises(TaskError, match="has been trained"):
        model.warm_start(torch.zeros(2, model.peft_config["default"].feature_dim))
    trainer(model, tmp_path, "a", [arm]).train()
    assert "a-2" not in arm.shares


def test_a_loop_of_ones_own_leaves_no_digests_of_before(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    trainer(model, tmp_path, "a", [arm]).train()
    model.reopen_task()
    assert "prompts" in model.peft_config["default"].records["a"]
    commit(model)
    assert "prompts" not in model.peft_config["default"].records["a"]


def test_rows_that_were_never_committed_do_not_bind(tmp_path) -> None:
    few = GeneratorSettings(epochs=0.1, max_draws=1)
    model, arm = fresh_pool(), ArmCallback(tokenizer(), replay="generated", generator=few)
    with pytest.raises(ReflectionError, match="usable pseudo-samples"):
        trainer(model, tmp_path, "a", [arm]).train()
    trainer(model, tmp_path, "c", [ArmCallback(tokenizer())]).train()
    assert model.committed_tasks == ["a"]


def test_a_refusal_lets_go_of_the_rows(tmp_path) -> None:
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    trainer(model, tmp_path, "a", [arm]).train()
    model.reopen_task()
    with pytest.raises(ReflectionError, match="was opened again"):
        trainer(model, tmp_path, "c", [arm]).train()
    assert arm.guard.handle is None
    with pytest.raises(ReflectionError, match="call prepare"):
        arm.reflect(model)
    model.reopen_task(forget=True)  # as the refusal says
    trainer(model, tmp_path, "c", [arm]).train()
    assert model.committed_tasks == ["a"]


def test_a_task_that_was_opened_and_moved_is_not() -> None:
    model = build_pool("llama", ["a", "b"])
    commit(model)
    model.reopen_task()
    next(p for name, p in model.named_parameters() if ".sapt_B." in name).data.add_(0.1)
    with pytest.raises(TaskError, match="cannot be committed"):
        model.add_task("c")
    assert model.tasks == ["a", "b"]


def test_digests_tell_prompts_and_not_their_order() -> None:
    rows = token_rows([4, 5, 6, 7])
    assert digests(rows) == digests(rows[::-1]) and len(set(digests(rows))) == 4
    assert not set(digests(rows)) & set(digests([[*row, 5] for row in rows]))
