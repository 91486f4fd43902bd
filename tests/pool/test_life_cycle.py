"""Tasks come, are frozen, saved, loaded and removed; old bytes never change."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model

from helpers.steps import ROWS, digests, logits, step
from helpers.tiny import FAMILIES, assert_real_pool, build_pool, commit, grow, padded
from peft_sapt import SaptConfig
from peft_sapt.errors import TaskError, TrainingError


def test_old_bytes_never_change(family: str) -> None:
    model = build_pool(family, ["a"])
    known: dict[str, dict[str, str]] = {}
    for following in ["b", "c", "d", "e"]:
        step(model)
        before = digests(model, model.current_task)
        step(model)
        assert digests(model, model.current_task) != before, "the current task must move, or this test is void"
        model.commit_task()
        known[model.current_task] = digests(model, model.current_task)
        model.add_task(following, r=3 + len(known), lora_alpha=16)
        for call in (disable_and_enable, set_adapter_again, lambda m: m.train()):
            call(model)
            step(model, 1)
        for name, digest in known.items():
            assert digests(model, name) == digest, name
    assert model.tasks == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_task_is_committed_with_a_weight_that_is_not_finite(value: float) -> None:
    model = build_pool("llama", ["a", "b"])
    step(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kept = parameter.data.clone()
            parameter.data.view(-1)[-1] = value
            with pytest.raises(
                TrainingError, match=re.escape(name.removeprefix("base_model.model.").split(".default")[0])
            ):
                model.commit_task()
            parameter.data.copy_(kept)
            assert model.committed_tasks == ["a"]
    model.commit_task()


def test_an_older_task_is_removed_while_the_newest_trains() -> None:
    model, other = build_pool("llama", ["a", "b", "c"]), build_pool("llama", ["b", "c"])
    for each in (model, other):
        step(each)
    rows = model.base_model.hooks.memory.seen("default")
    model.remove_task("a")
    assert torch.equal(rows[0], model.base_model.hooks.memory.seen("default")[0])
    model.commit_task()
    assert model.committed_tasks == ["b", "c"]
    other.remove_task("c")
    assert not other.base_model.hooks.memory.seen("default"), "rows of a task that is gone"


def test_a_task_that_was_trained_without_reading_prompts_says_so() -> None:
    model = build_pool("llama", ["a"])
    batch = padded(ROWS)
    model.train()(**batch, labels=batch["input_ids"], sapt_task="a").loss.backward()
    with pytest.raises(TaskError, match=r"with sapt_task or sapt_weights read none.*commit_task\(inputs=batches\)"):
        model.commit_task()
    model.commit_task(inputs=[batch])
    model.reopen_task()
    with pytest.raises(TaskError, match="since the task was opened or last committed"):
        model.commit_task()


def disable_and_enable(model) -> None:
    with model.disable_adapter():
        pass


def set_adapter_again(model) -> None:
    model.set_adapter("default")


def test_exactly_the_new_block_the_key_and_the_projection_train(family: str) -> None:
    model = build_pool(family, ["a", "b", "c"])
    trainable = {n.split(".sapt_")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"A", "B", "key", "query_down", "query_up", "query_norm"}
    commit(model)
    for call in (disable_and_enable, set_adapter_again, lambda m: m.base_model.set_requires_grad("default")):
        call(model)
        assert not any(p.requires_grad for p in model.parameters())
    model.reopen_task()
    assert any(p.requires_grad for p in model.parameters())


def test_a_new_task_is_the_identity_under_its_own_weight(family: str) -> None:
    model = build_pool(family, ["a"], init_weights=True)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model), base)
    step(model)
    model.add_task("b")
    torch.testing.assert_close(logits(model, sapt_task="b"), base, atol=1e-6, rtol=0)


@pytest.mark.parametrize("committed", [True, False])
def test_saved_and_loaded_bit_for_bit(family: str, committed: bool, tmp_path) -> None:
    model = build_pool(family, ["a", "b", "c"], temperature=3.0)
    step(model, 1)
    assert_real_pool(model.attention_weights(**padded(ROWS)))
    if committed:
        model.commit_task(replay=[padded(ROWS)])
    model.save_pretrained(tmp_path)
    task_type, make = FAMILIES[family]
    base = make()
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.tasks == ["a", "b", "c"]
        assert loaded.committed_tasks == (["a", "b", "c"] if committed else ["a", "b"])
        assert [len(r) for r in loaded.base_model.hooks.memory.replay("default")] == [0, 0, 4 if committed else 0]
    base.save_pretrained(tmp_path / "base")
    auto = AutoPeftModelForCausalLM if task_type == "CAUSAL_LM" else AutoPeftModelForSeq2SeqLM
    loaded.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "again")), logits(model))
    grow(loaded, "d")  # a pool loaded for inference goes on learning
    step(loaded)
    assert digests(loaded, "b") == digests(model, "b")
    torch.testing.assert_close(  # products of another size may add up in another order
        logits(loaded, sapt_task="b"), logits(model, sapt_task="b"), atol=1e-5, rtol=1e-5
    )


def test_removing_a_task_leaves_the_others_as_they_were(family: str) -> None:
    for removed in "abcd":
        model = build_pool(family, list("abcd"))
        commit(model)
        before = {name: (digests(model, name), logits(model, sapt_task=name)) for name in model.tasks}
        model.remove_task(removed)
        kept = [name for name in "abcd" if name != removed]
        assert model.tasks == kept
        for name in kept:
            assert digests(model, name) == before[name][0]
            torch.testing.assert_close(logits(model, sapt_task=name), before[name][1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.attention_weights(**padded(ROWS)).sum(1), torch.ones(len(ROWS)))


def test_commit_stores_the_mean_attention_and_the_first_key(family: str) -> None:
    model = build_pool(family, ["a"])
    attention = model.base_model.attention
    model.commit_task(inputs=[padded(ROWS[:2]), padded(ROWS[2:])])
    pooled = model.pooled_prompts([padded(ROWS)])
    torch.testing.assert_close(
        attention.sapt_key["default"].weight.data[0], attention.query(pooled, "default").mean(0).data
    )
    model.add_task("b")
    model.commit_task(inputs=[padded(ROWS)])
    expected = model.attention_weights(**padded(ROWS)).mean(0)
    torch.testing.assert_close(model.base_model.hooks.memory.targets("default")[1], expected)
    torch.testing.assert_close(model.base_model.hooks.memory.targets("default")[0], torch.tensor([1.0, 0.0]))


def test_committing_without_inputs_uses_the_rows_seen_in_training(family: str) -> None:
    model = build_pool(family, ["a", "b"])
    model.train()
    batch = padded(ROWS)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = 7
    model(**batch, labels=labels)
    expected = model.attention_weights(**batch, labels=labels).mean(0)
    model.commit_task()
    torch.testing.assert_close(model.base_model.hooks.memory.targets("default")[1], expected)


def test_trained_twice_ends_in_a_defined_state(family: str) -> None:
    model = build_pool(family, ["a"])
    commit(model)
    with pytest.raises(TaskError, match="committed already"):
        model.commit_task()
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "labels": torch.tensor([[-100, -100, 5]])}
    with pytest.raises(TrainingError, match=r"'a' is committed.*reopen_task"):
        model.train()(**batch)
    model.reopen_task()
    model(**batch)
    model.commit_task()
    assert model.committed_tasks == ["a"]


def test_copies_and_pickles(pool) -> None:
    expected = logits(pool)
    assert torch.equal(logits(copy.deepcopy(pool)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(pool))), expected)
    twin = copy.deepcopy(pool)
    grow(twin, "d")
    assert pool.tasks == ["a", "b", "c"]
    assert torch.equal(logits(pool), expected)


def test_unload_gives_the_base_model_back(pool) -> None:
    with pool.disable_adapter():
        expected = logits(pool)
    with pytest.raises(ValueError, match="cannot be merged"):
        pool.merge_and_unload()
    base = pool.unload()
    assert torch.equal(logits(base), expected)
    assert not [name for name, _ in base.named_modules() if "sapt" in name or "shared_attention" in name]


def test_one_task_is_plain_lora(family: str) -> None:
    model = build_pool(family, ["a"], r=4, task_ranks=[4])
    task_type, make = FAMILIES[family]
    base = make()
    base.load_state_dict(copy.deepcopy(model).unload().state_dict())
    lora = get_peft_model(base, LoraConfig(task_type=task_type, r=4, lora_alpha=32))
    layers = {n: m for n, m in lora.named_modules() if hasattr(m, "lora_A")}
    for name, module in model.named_modules():
        if hasattr(module, "sapt_A"):
            twin = layers.pop(name)
            twin.lora_A["default"].weight.data.copy_(module.sapt_A["default"].weight.data)
            twin.lora_B["default"].weight.data.copy_(module.sapt_B["default"].weight.data.T)
    assert not layers, "SAPT and LoRA must target the same modules by default"
    torch.testing.assert_close(logits(model), logits(lora), atol=1e-5, rtol=0)


def test_the_callers_config_is_not_changed() -> None:
    config = SaptConfig(task_type="CAUSAL_LM", task_name="a")
    model = get_peft_model(FAMILIES["llama"][1](), config)
    grow(model, "b")
    assert config.tasks == ["a"]
    assert model.peft_config["default"].tasks == ["a", "b"]


def test_switching_pools(family: str) -> None:
    model = build_pool(family, ["a", "b", "c"]).eval()
    first = logits(model)
    task_type, _ = FAMILIES[family]
    model.add_adapter("other", SaptConfig(task_type=task_type, tasks=["x", "y"], init_weights=False))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert model.tasks == ["x", "y"]
    assert not torch.allclose(logits(model), first)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="One pool"):
        model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
