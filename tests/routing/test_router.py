"""The closed-form router: its algebra against recomputation, its life in a pool, a stream without any replay."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from helpers.tiny import assert_real_pool, build_pool, commit, padded, tiny_llama, tiny_t5, token_rows
from helpers.training import fresh_pool, trainer
from helpers.words import MARKS, TASKS, prompts_of, rows_of, tokenizer
from peft_sapt import ArmCallback, SaptConfig
from peft_sapt.errors import PromptError, ReflectionError, SaptError, TaskError
from peft_sapt.routing import ridge
from peft_sapt.routing.packing import mean_pool_segments
from peft_sapt.storage.manifest import digest

ROWS = token_rows([5, 9, 3, 12])
SUMS = ("sapt_mean", "sapt_old_means")


def task_rows(count: int, tasks: int, width: int = 6, seed: int = 0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count + 3 * t, width, generator=rng) + 2 * F.one_hot(torch.tensor(t), width) for t in range(tasks)
    ]


def regression(rows: list[torch.Tensor], strength: float) -> torch.Tensor:
    """Ridge regression from all rows at once, each weighed by 1 / rows of its task: solution [T, D]."""
    x = [ridge.features(r) for r in rows]
    weights = torch.cat([torch.full((len(r),), 1 / len(r), dtype=torch.float64) for r in x])
    labels = torch.cat([F.one_hot(torch.full((len(r),), t), len(x)).double() for t, r in enumerate(x)])
    every = torch.cat(x)
    gram = every.mT @ (weights[:, None] * every)
    noise = strength * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + noise, every.mT @ (weights[:, None] * labels)).mT


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), tasks=st.integers(1, 5), strength=st.sampled_from([1e-3, 0.1, 10.0]))
def test_running_sums_give_the_regression_on_all_rows(seed: int, tasks: int, strength: float) -> None:
    rows = task_rows(5, tasks, seed=seed)
    x = [ridge.features(r) for r in rows]
    gram = sum(ridge.second_moment(r) for r in x)
    means = torch.stack([r.mean(dim=0) for r in x])
    torch.testing.assert_close(ridge.solve(gram, means, strength), regression(rows, strength), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("task", [0, 2])
def test_left_out_scores_are_those_of_a_regression_without_the_row(task: int) -> None:
    rows = task_rows(6, 3)
    x = [ridge.features(r) for r in rows]
    gram, means = sum(ridge.second_moment(r) for r in x), torch.stack([r.mean(dim=0) for r in x])
    found = ridge.left_out_scores(x[task], gram, means, 0.1, task)
    noise = ridge.regularised(gram, 0.1) - gram
    for i in range(len(rows[task])):
        rest = torch.cat([x[task][:i], x[task][i + 1 :]])
        share = 1 / len(x[task])  # the weight of the rows that stay is the same
        without = gram - share * torch.outer(x[task][i], x[task][i]) + noise
        sums = means.clone()
        sums[task] = rest.sum(dim=0) * share
        expected = torch.linalg.solve(without, sums.mT).mT @ x[task][i]
        torch.testing.assert_close(found[i], expected, rtol=1e-8, atol=1e-10)


def test_the_temperature_is_the_softest_that_leaves_a_task_its_share() -> None:
    torch.manual_seed(0)
    scores = torch.rand(20, 3, dtype=torch.float64) * 0.5 + F.one_hot(torch.tensor(1), 3)
    found = ridge.calibrated_temperature(scores, 1, own_share=0.9)

    def own(t: float, rows: slice = slice(None)) -> float:
        lead = scores[:, 1] - scores[:, [0, 2]].amax(dim=1)
        return float((scores[lead.argsort()][rows] / t).softmax(1)[:, 1].mean())

    quarter = slice(5)  # which it leads by least
    assert 0.9 <= own(found, quarter) < 0.92 and own(found) >= 0.9
    assert all(own(float(t), quarter) < 0.9 for t in ridge.TEMPERATURES if t > found)
    scores[:5] = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # a quarter looks like another task
    found = ridge.calibrated_temperature(scores, 1, own_share=0.9)
    assert 0.9 * (0.75 - 0.1) <= own(found) < 0.9 * 0.75
    blind = ridge.calibrated_temperature(torch.rand(50, 3, dtype=torch.float64), 1)
    assert float((torch.rand(50, 3) / blind).softmax(1).amax(1).mean()) < 0.6, "no evidence, yet no doubt"


@settings(max_examples=50)
@given(margins=st.lists(st.floats(0.05, 3), min_size=2, max_size=6), later=st.integers(0, 20))
def test_a_pool_that_grows_keeps_the_share_of_its_tasks(margins: list[float], later: int) -> None:
    """Each task calibrated to the share when it came; with equal margins all of them have it later too."""
    share, margin = ridge.OWN_SHARE, margins[0]

    def calibrated(m: float, count: int) -> float:
        return m / float(np.log((count - 1) * share / (1 - share)))

    every = [0.0, *(calibrated(margin, n) for n in range(2, len(margins) + 2))]
    count = len(every) + later
    t = float(ridge.common_temperature(torch.tensor(every + [0.0] * later), count))
    scores = torch.zeros(count, dtype=torch.float64)
    scores[1] = margin
    assert float((scores / t).softmax(0)[1]) == pytest.approx(share, abs=1e-4)
    mixed = torch.tensor([0.0, *(calibrated(m, n) for n, m in enumerate(margins, start=2))])
    expected = calibrated(float(np.exp(np.mean(np.log(margins)))), len(mixed))
    assert float(ridge.common_temperature(mixed, len(mixed))) == pytest.approx(expected, rel=1e-4)
    assert ridge.common_temperature(torch.zeros(3), 3).isnan()


def test_weights_of_a_row_are_its_own(family: str = "llama") -> None:
    pool = build_pool(family, ["a", "b", "c"], router="ridge").eval()
    weights = pool.attention_weights(**padded(ROWS))
    assert_real_pool(weights)
    torch.testing.assert_close(pool.attention_weights(**padded(ROWS, "right", 7)), weights, atol=1e-6, rtol=0)
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(pool.attention_weights(**padded([row]))[0], weights[i], atol=1e-6, rtol=0)


def test_segments_are_pooled_like_rows() -> None:
    embeddings, segments = torch.randn(1, 9, 4), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 0]]).bool()
    found = mean_pool_segments(embeddings, mask, segments)
    torch.testing.assert_close(found[0], embeddings[0, :2].mean(0))
    torch.testing.assert_close(found[1], embeddings[0, 3:6].mean(0))
    assert bool(found[2].isnan().all())


def test_a_stream_without_replay(tmp_path) -> None:
    """Gates open before the first step, old tasks keep their prompts, no row is stored, and old sums never change."""
    pool, arm, sums = fresh_pool(router="ridge", fallback=None), ArmCallback(tokenizer()), {}
    for name in TASKS:
        if name not in pool.tasks:
            pool.add_task(name)
        run = trainer(pool, tmp_path, name, [arm])
        run.train()
        scales = [h[f"attention/{name}"] for h in run.state.log_history if f"attention/{name}" in h]
        assert min(scales) > 0.5, scales
        for old, found in sums.items():
            assert {k: digest(v) for k, v in pool.task_state(old).items()} == found, f"{old} changed"
        sums[name] = {k: digest(v) for k, v in pool.task_state(name).items()}
    assert pool.committed_tasks == TASKS and pool.peft_config["default"].replay_rows == [0, 0, 0]
    for i, name in enumerate(TASKS):
        weights = pool.attention_weights(**prompts_of(name, seed=9))
        assert float((weights.argmax(dim=1) == i).float().mean()) >= 0.95
        assert float(weights[:, i].mean()) >= 0.5
    targets = pool.base_model.hooks.memory.targets("default")
    assert bool((targets.diagonal() > 0.5).all())
    trained = {n for n, p in pool.named_parameters() if p.requires_grad}
    assert not [n for n in trained if "shared_attention" in n]
    # the order of the tasks changes nothing
    reverse = fresh_pool(router="ridge", fallback=None)
    for name in reversed(TASKS):
        if reverse.tasks == ["a"] and name == "c":
            reverse = get_peft_model(
                reverse.unload(), SaptConfig(task_type="CAUSAL_LM", task_name="c", router="ridge")
            )
        else:
            reverse.add_task(name)
        reverse.fit_router([collate_prompts(name)])
        reverse.commit_task(reverse.pooled_prompts([collate_prompts(name)]))
    mine, theirs = pool.base_model.router, reverse.base_model.router
    torch.testing.assert_close(
        mine.sapt_solved["default"].weight, theirs.sapt_solved["default"].weight.flip(0), atol=1e-4, rtol=1e-3
    )


def collate_prompts(task: str) -> dict[str, torch.Tensor]:
    return padded([row["input_ids"][:-1] for row in rows_of(task)])


@pytest.mark.parametrize("low_memory", [False, True])
def test_saved_and_loaded_and_learned_on(tmp_path, low_memory: bool) -> None:
    pool = build_pool("llama", ["a", "b", "c"], router="ridge").eval()
    pool.save_pretrained(tmp_path)
    assert "sapt_query" not in " ".join(load_file(tmp_path / "adapter_model.safetensors"))
    base = copy.deepcopy(pool).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory).eval()
    batch = padded(ROWS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, pool(**batch).logits)
    commit(loaded)
    before = {name: {k: digest(v) for k, v in loaded.task_state(name).items()} for name in "abc"}
    loaded.add_task("d")
    assert float(loaded.attention_weights(**batch)[:, 3].max()) == 0.0, "the router cannot know this task yet"
    loaded.fit_router([batch])
    assert bool((loaded.attention_weights(**batch).argmax(dim=1) == 3).all())
    loaded.train()(**padded(ROWS, "right"), labels=padded(ROWS, "right")["input_ids"].index_fill(
        1, torch.tensor([0, 1]), -100)).loss.backward()  # fmt: skip
    loaded.commit_task()
    after = {name: {k: digest(v) for k, v in loaded.task_state(name).items()} for name in "abc"}
    assert before == after
    loaded.remove_task("b")
    weights = loaded.attention_weights(**batch)
    assert weights.shape == (4, 3) and bool((weights.argmax(dim=1) == 2).all())
    assert {k: digest(v) for k, v in loaded.task_state("a").items()} == before["a"]


def test_a_row_far_from_every_task_is_left_to_the_base_model() -> None:
    torch.manual_seed(0)
    base = tiny_llama()
    torch.nn.init.normal_(base.get_input_embeddings().weight)
    config = SaptConfig(task_type="CAUSAL_LM", tasks=["a", "b"], router="ridge", fallback=0.6)
    pool = get_peft_model(base, config)
    pool.base_model.router.sapt_mean["default"].weight.data.zero_()
    pool.remove_task("a")
    pool.fit_router([collate_prompts("a")])
    pool.add_task("c")
    pool.fit_router([collate_prompts("c")])
    pool.eval()
    for layer in pool.modules():
        for name in ("sapt_B", "sapt_old_B"):
            if hasattr(layer, name):
                torch.nn.init.normal_(getattr(layer, name)["default"].weight)
    known, foreign = collate_prompts("c"), padded([[80, 81, 82, 83, 84], [90, 91, 92, 93, 94]])
    assert not set(range(80, 95)) & set(MARKS["a"]) | (set(range(80, 95)) & set(MARKS["c"]))
    assert float((pool.attention_weights(**known).sum(dim=1) > 0).float().mean()) > 0.9
    assert float(pool.attention_weights(**foreign).sum()) == 0.0
    written = pool.generate(**foreign, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        found = pool(**foreign).logits
        with pool.disable_adapter():
            assert torch.equal(found, pool(**foreign).logits)
            assert torch.equal(written, pool.generate(**foreign, max_new_tokens=3, do_sample=False))


def test_a_task_is_committed_though_the_base_model_answers_all_its_prompts() -> None:
    pool = fresh_pool(router="ridge", fallback=5.0)
    pool.fit_router([collate_prompts("a")])
    assert not bool(pool.eval().attention_weights(**collate_prompts("a")).any())
    pool.commit_task()
    assert pool.committed_tasks == ["a"]
    assert not any(p.requires_grad for p in pool.parameters())
    pool.add_task("b")
    assert pool.tasks == ["a", "b"]


def test_a_target_comes_of_training_rows_where_there_are_some() -> None:
    """fit_router sees the whole data set, of which training may see other rows, or more often the same ones."""
    pool = fresh_pool(router="ridge")
    pool.fit_router([collate_prompts("a")])
    pool.train()(**(batch := collate_prompts("a")), labels=batch["input_ids"].index_fill(1, torch.arange(8), -100))
    pool.commit_task()
    pool.add_task("b")
    pool.fit_router([collate_prompts("b")])
    seen = {k: v[:3] for k, v in collate_prompts("b").items()}
    seen["labels"] = seen["input_ids"].index_fill(1, torch.arange(8), -100)
    pool.train()(**seen)
    pool.commit_task()
    found = pool.base_model.hooks.memory.targets("default")[-1]
    torch.testing.assert_close(found, pool.eval().attention_weights(**seen).mean(dim=0))


def test_an_encoder_decoder_shares_the_weights_with_its_decoder() -> None:
    torch.manual_seed(0)
    pool = get_peft_model(tiny_t5(), SaptConfig(task_type="SEQ_2_SEQ_LM", tasks=["a", "b", "c"], router="ridge",
                                                init_weights=False)).eval()  # fmt: skip
    settings_ = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = pool.generate(**padded(ROWS, "right"), **settings_)
    for i, row in enumerate(ROWS):
        weights = pool.attention_weights(**padded([row]))
        assert torch.equal(found[i : i + 1], pool.generate(**padded([row]), sapt_weights=weights, **settings_))


def test_refusals() -> None:
    learned = build_pool("llama", ["a", "b", "c"])
    with pytest.raises(TaskError, match="router='ridge'"):
        learned.fit_router([padded(ROWS)])
    with pytest.raises(SaptError, match=r"SaptConfig\.fallback must be 'auto', a number or None"):
        SaptConfig(fallback="often")
    with pytest.raises(SaptError, match=r"pool_padding.*features='max'"):
        SaptConfig(pool_padding=True, features="both")
    with pytest.raises(SaptError, match=r"pool_padding.*router='attention'"):
        SaptConfig(router="ridge", pool_padding=True)
    with pytest.raises(SaptError, match=r"SaptConfig\.ridge must be a positive number"):
        SaptConfig(router="ridge", ridge=0)
    for wrong in (["ridge"], {}, None, 3):
        with pytest.raises(SaptError, match=r"SaptConfig\.router must be"):
            SaptConfig(router=wrong)
    with pytest.raises(TaskError, match="is fitted in training"):
        learned.fit_router([])
    pool = fresh_pool(router="ridge")
    with pytest.raises(PromptError, match="got none"):
        pool.fit_router([])
    with pytest.raises(TaskError, match=r"no training prompt of it is known"):
        pool.add_task("b")
    batch = padded(ROWS, "right")
    labels = batch["input_ids"].index_fill(1, torch.tensor([0, 1]), -100)
    with pytest.raises(TaskError, match=r"not seen prompts of task 'a'.*fit_router"):
        pool.train()(**batch, labels=labels)
    pool.fit_router([batch])
    with pytest.raises(TaskError, match=r"seen task 'a' already"):
        pool.fit_router([batch])
    pool.train()(**batch, labels=labels)
    arm = ArmCallback(tokenizer(), replay="generated")
    with pytest.raises(ReflectionError, match="needs no replay"):
        arm.penalty(pool)


def test_a_resumed_run_is_bit_identical(tmp_path) -> None:
    finals = []
    for resume in (False, True):
        pool, arm = fresh_pool(router="ridge"), ArmCallback(tokenizer(), replay="generated")
        trainer(pool, tmp_path / "first", "a", [arm]).train()
        pool.add_task("b")
        folder = tmp_path / str(resume)
        settings_ = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}
        if resume:
            state = copy.deepcopy(pool)
            trainer(state, folder, "b", [ArmCallback(tokenizer(), replay="generated")], **settings_).train()
            trainer(pool, folder, "b", [arm], **settings_).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
        else:
            trainer(pool, folder, "b", [arm], **settings_).train()
        finals.append({k: v.clone() for k, v in pool.state_dict().items()})
    assert [k for k in finals[0] if not torch.equal(finals[0][k], finals[1][k])] == []


def test_existing_loras_become_tasks_without_any_training(tmp_path) -> None:
    """Two plain LoRAs and some prompts of each make a pool that chooses between them."""
    donor = build_pool("llama", ["a", "b", "c"])
    base = copy.deepcopy(donor).unload()
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", task_name="a", router="ridge"))
    for name in ("a", "b"):
        donor.export_task(name, tmp_path / name)
        pool.import_task(name, tmp_path / name)
        pool.commit_task(inputs=[collate_prompts(name)])
    assert pool.committed_tasks == ["a", "b"]
    pool.eval(), donor.eval()
    for i, name in enumerate(("a", "b")):
        prompts = prompts_of(name, seed=5)
        assert float((pool.attention_weights(**prompts).argmax(dim=1) == i).float().mean()) >= 0.95
        with torch.no_grad():
            torch.testing.assert_close(
                pool(**prompts, sapt_task=name).logits, donor(**prompts, sapt_task=name).logits, atol=1e-5, rtol=1e-4
            )


def test_a_deleted_pool_leaves_no_memory_of_its_router() -> None:
    """A pool of the same name and task must be shown its prompts again."""
    config = SaptConfig(task_type="CAUSAL_LM", task_name="t", router="ridge")
    pool = fresh_pool()
    batch = padded(ROWS, "right")
    labels = batch["input_ids"].index_fill(1, torch.tensor([0, 1]), -100)
    for _ in range(2):
        pool.add_adapter("other", config)
        pool.set_adapter("other")
        with pytest.raises(TaskError, match=r"not seen prompts of task 't'"):
            pool.train()(**batch, labels=labels)
        pool.fit_router([batch])
        pool(**batch, labels=labels)
        pool.set_adapter("default")
        pool.delete_adapter("other")
