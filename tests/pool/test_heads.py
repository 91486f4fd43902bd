"""Heads and other modules that a pool saves whole: they belong to one task, travel with it, and never move again."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper

from helpers.tiny import build_pool, commit, padded, tiny_llama, token_rows
from helpers.zoo import batch_of, loss_of, out, pool_of, result
from peft_sapt import SaptConfig
from peft_sapt.errors import TaskError, TrainingError

ROWS = token_rows([5, 9, 3, 12])


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**padded(ROWS), **kwargs).logits


def test_saved_modules_are_never_looked_for_in_the_attention(tmp_path) -> None:
    """A second adapter that saves every "norm" of the base, as plain LoRA's may."""
    full = {"modules_to_save": ["embed_tokens", "norm", "key"], "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", task_name="x", **full))
    model.add_adapter("b", SaptConfig(task_type="CAUSAL_LM", task_name="y", **full))
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "c")
    wrapped = {n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    assert {"base_model.model.model.embed_tokens", "base_model.model.model.norm"} <= wrapped
    assert not [name for name in wrapped if "shared_attention" in name]


def test_a_saved_module_travels_with_a_pool_of_one_task(tmp_path) -> None:
    model = build_pool("llama", ["a"], modules_to_save=["lm_head"]).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = model.unload()
    base.lm_head.reset_parameters()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path).eval()), expected)
    with pytest.raises(TaskError, match="one head"):
        build_pool("llama", ["a"], modules_to_save=["lm_head"]).add_task("b")


@pytest.mark.parametrize("name", ["BERT, sequence", "BERT, token", "BERT, question", "Llama, sequence"])
def test_a_second_task_never_overwrites_a_head(name) -> None:
    """The head belongs to the task it was trained with: another task needs another pool, and gets its own head."""
    model = pool_of(name, tasks=["a"], task_ranks=[2])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TaskError, match=r"one head.*one adapter per task"):
        model.add_task("b")
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after)
    with torch.no_grad():
        expected = result(model(**batch_of(name)))
        model.add_adapter("b", SaptConfig(task_type=model.peft_config["default"].task_type, task_name="b"))
        model.set_adapter("b")
        for key, parameter in model.named_parameters():
            if ".b." in key and "modules_to_save" in key:
                parameter.add_(1.0)
        assert not torch.allclose(result(model(**batch_of(name))), expected, atol=1e-3)
        model.set_adapter("default")
        assert torch.equal(result(model(**batch_of(name))), expected)


@pytest.mark.parametrize("switch", ["nothing", "disable", "set"])
def test_the_head_of_a_committed_task_never_moves(switch) -> None:
    model = pool_of("BERT, sequence", tasks=["a"], task_ranks=[2])
    heads = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert heads and all(p.requires_grad for p in heads.values())
    commit(model)
    expected = out("BERT, sequence", model, sapt_task="a")
    if switch == "disable":
        with model.disable_adapter():
            pass
    elif switch == "set":
        model.set_adapter("default")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="'a' is committed"):
        loss_of("BERT, sequence", model.train())
    optimizer.step()
    assert torch.equal(out("BERT, sequence", model.eval(), sapt_task="a"), expected)
    model.reopen_task()
    assert all(p.requires_grad for p in heads.values())


def test_a_head_that_tasks_share_is_not_trained() -> None:
    model = pool_of("BERT, sequence")
    loss_of("BERT, sequence", model.train()).backward()
    moved = [n for n, p in model.named_parameters() if p.grad is not None]
    assert moved and not [n for n in moved if "modules_to_save" in n]
