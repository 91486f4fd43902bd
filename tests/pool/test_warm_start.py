"""A new block may start at the mixture of older ones: against a dense SVD, and the mixture's own output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import set_seed

from helpers.tiny import commit, grow, tiny_llama
from helpers.training import fresh_pool, trainer
from helpers.words import tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.errors import PromptError, TaskError
from peft_sapt.ops.low_rank import low_rank_sum


def ids(seed: int, rows: int = 4) -> torch.Tensor:
    return torch.randint(3, 60, (rows, 7), generator=torch.Generator().manual_seed(seed))


def pool_of_three(**fields):
    """Two random old blocks and a fresh third one."""
    set_seed(0)
    fields = {"r": 2, "init_weights": False, **fields}
    model = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], **fields))
    model.peft_config["default"].init_weights = True
    grow(model, "c")
    return model


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31 - 1))
def test_it_is_the_nearest_matrix_of_its_rank(rows_in: int, rows_out: int, ranks: int, rank: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(ranks, rows_in, generator=random), torch.randn(ranks, rows_out, generator=random)
    gains = torch.randn(ranks, generator=random)
    new_a, new_b = low_rank_sum(a, b, gains, rank)
    dense = (b.double().mT * gains.double()) @ a.double()  # [out, in]
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    s[rank:] = 0
    best = u @ torch.diag(s) @ vh
    got = new_b.double().mT @ new_a.double()
    assert new_a.shape == (rank, rows_in) and new_b.shape == (rank, rows_out)
    assert torch.linalg.norm(dense - got) <= torch.linalg.norm(dense - best) + 1e-5 * (1 + s[0])
    torch.testing.assert_close(new_a.norm(dim=1), new_b.norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"router": "ridge"}, {"block": "prompt", "num_virtual_tokens": 3}])
def test_the_new_block_alone_answers_as_the_mixture_does(fields) -> None:
    fields = fields if "block" in fields else {"target_modules": ["q_proj", "v_proj"], **fields}
    model = pool_of_three(**fields).eval()
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    prompts = ids(1)
    old = model.attention_weights(prompts)[:, :-1]
    shares = model.warm_start([{"input_ids": prompts}])
    if "router" not in fields:
        torch.testing.assert_close(torch.tensor(list(shares.values())), (old / old.sum(1, keepdim=True)).mean(0))
    assert list(shares) == ["a", "b"] and sum(shares.values()) == pytest.approx(1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, kept[k])}
    assert changed and all(".sapt_A." in k or ".sapt_B." in k or ".sapt_prompt." in k for k in changed)
    mixed = torch.tensor([*shares.values(), 0.0])
    with torch.no_grad():
        mixture = model(input_ids=prompts, sapt_weights=mixed).logits
        alone = model(input_ids=prompts, sapt_task="c").logits
        base = model(input_ids=prompts, sapt_weights=torch.zeros(3)).logits if "block" not in fields else None
    if "block" in fields:
        torch.testing.assert_close(alone, mixture)
        return
    # rank 2 of the mixture's 4: nearer to it than the base model is
    assert (alone - mixture).norm() < 0.8 * (base - mixture).norm()


def test_with_room_for_all_ranks_it_is_the_mixture_itself() -> None:
    set_seed(0)
    config = SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], r=2, init_weights=False, lora_alpha=8)
    model = get_peft_model(tiny_llama(), config).eval()
    model.peft_config["default"].init_weights = True
    grow(model, "c", r=4, lora_alpha=3)
    shares = model.warm_start([{"input_ids": ids(1)}])
    with torch.no_grad():
        mixture = model(input_ids=ids(2), sapt_weights=torch.tensor([*shares.values(), 0.0])).logits
        alone = model(input_ids=ids(2), sapt_task="c").logits
    torch.testing.assert_close(alone, mixture, atol=1e-4, rtol=1e-4)


def test_refusals_change_nothing() -> None:
    model = get_peft_model(tiny_llama(), SaptConfig(task_type="CAUSAL_LM", task_name="a", r=2))
    with pytest.raises(TaskError, match="first task"):
        model.warm_start([{"input_ids": ids(1)}])
    model = pool_of_three()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PromptError, match="got none"):
        model.warm_start([])
    with pytest.raises(PromptError, match="no prompt token"):
        model.warm_start([{"input_ids": ids(1), "attention_mask": torch.zeros(4, 7, dtype=torch.long)}])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.warm_start([{"input_ids": ids(1)}])
    with pytest.raises(TaskError, match="has been trained"):
        model.warm_start([{"input_ids": ids(1)}])
    commit(model)
    with pytest.raises(TaskError, match="committed"):
        model.warm_start([{"input_ids": ids(1)}])
    ridge = pool_of_three(router="ridge")
    ridge.fit_router([{"input_ids": ids(3)}])
    with pytest.raises(TaskError, match="before fit_router"):
        ridge.warm_start([{"input_ids": ids(3)}])


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_the_callback_starts_a_new_block_once(tmp_path, router: str) -> None:
    """At a rate of zero what training leaves is what it began with."""
    model = fresh_pool(router=router)
    arm = ArmCallback(tokenizer(), replay="rows", warm_start=True)
    trainer(model, tmp_path, "a", [arm]).train()
    model.add_task("b")
    trainer(model, tmp_path, "b", [arm], learning_rate=0.0).train()
    assert arm.shares == {"b": {"a": pytest.approx(1.0)}} and model.committed_tasks == ["a", "b"]
    factors = model.task_state("a"), model.task_state("b")
    names = [name for name in factors[0] if name.endswith("sapt_A")]
    for name in names:
        old, new = (f[name.replace("sapt_A", "sapt_B")].T @ f[name] for f in factors)
        torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-4)
        assert old.any()
    model.reopen_task()
    trainer(model, tmp_path, "b", [arm]).train()
    trained = model.task_state("b")
    model.reopen_task()
    trainer(model, tmp_path, "b", [arm], learning_rate=0.0).train()
    assert all(torch.equal(trained[name], value) for name, value in model.task_state("b").items() if "_B" in name)
