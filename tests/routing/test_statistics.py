"""Statistics of a task's prompts: what they hold, what is drawn from them, and that they never change again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel

from helpers.steps import step
from helpers.tiny import build_pool, commit, grow, padded, token_rows
from helpers.training import TASKS, fresh_pool, learn_stream, own_weights, prompts_of, rows_of, trainer
from helpers.words import tokenizer
from peft_sapt import ArmCallback
from peft_sapt.errors import ReflectionError
from peft_sapt.routing import statistics
from peft_sapt.routing.moments import Moments, noise_of
from peft_sapt.storage.manifest import digest


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Rows [n, d] that vary in some directions more than in others, around a mean that is not 0."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=rng) * torch.logspace(0, -2, d)[:, None]
    return torch.randn(n, d, generator=rng) @ mixing + torch.randn(d, generator=rng)


@pytest.mark.parametrize(
    "n, d, rank", [(200, 12, 12), (200, 12, 4), (6, 12, 8), (2, 12, 8), (1, 12, 8), (900, 700, 8)]
)
def test_moments_against_numpy(n: int, d: int, rank: int) -> None:
    x = cloud(n, d)
    found = Moments.of(x, rank)
    assert found.directions.shape == (rank, d) and found.rows == n
    np.testing.assert_allclose(found.mean, x.mean(dim=0), atol=1e-5)
    covariance = np.cov(x.numpy().astype(float), rowvar=False) if n > 1 else np.zeros((d, d))
    mine = (found.directions.T @ found.directions).double() + torch.diag(found.left.double() ** 2)
    np.testing.assert_allclose(np.diag(mine), np.diag(covariance), rtol=1e-3, atol=1e-5)  # variances are kept whole
    values, vectors = np.linalg.eigh(covariance)
    k = min(rank, n - 1, d)
    kept = vectors[:, -k:] @ np.diag(values[-k:]) @ vectors[:, -k:].T if k else np.zeros((d, d))
    np.testing.assert_allclose(found.directions.T @ found.directions, kept, atol=2e-3 * max(1.0, values[-1]))


def test_many_long_prompts_keep_what_varies_most() -> None:
    """Where not all directions are computed: as much of the variance as the best ones have."""
    x = cloud(900, 700)
    found = Moments.of(x, 8)
    best = torch.linalg.svdvals((x - x.mean(dim=0)).double() / 899**0.5)[:8].square().sum()
    assert float(found.directions.double().square().sum()) >= 0.99 * float(best)
    assert torch.equal(found.directions, Moments.of(x, 8).directions), "and the same ones every time"


def test_the_second_moment_is_that_of_the_rows() -> None:
    x = cloud(300, 10)
    found = Moments.of(x, 10).second_moment()
    one = torch.cat([x.double(), torch.ones(300, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found, one.T @ one / 300, rtol=0.02, atol=0.02)  # n - 1 in place of n


def test_noise_has_the_covariance() -> None:
    own = Moments.of(cloud(400, 8), 3)
    drawn = noise_of(own, 60_000, torch.Generator().manual_seed(0)).double()
    expected = (own.directions.T @ own.directions).double() + torch.diag(own.left.double() ** 2)
    assert float(drawn.mean(dim=0).abs().max()) < 0.05
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), expected, atol=0.05, rtol=0.05)


def pool_of_clouds(sizes: list[int], **config):
    """A pool whose tasks have statistics of clouds of so many rows."""
    pool, clouds = build_pool("llama", ["a"], features="mean", **config), []
    for i, n in enumerate(sizes):
        if i:
            pool.add_task("abcdefgh"[i])
        clouds.append(cloud(n, 64, seed=i))
        pool.commit_task(clouds[-1], replay=clouds[-1][:2])
    return pool, clouds


def test_draws_share_the_covariance_as_they_say() -> None:
    """(1 - s) C_own + s mean C_t + blur^2, with s = 100 / (100 + n)."""
    pool, _ = pool_of_clouds([50, 900])
    known = pool.base_model.pool.statistics
    few, many = known.draw("default", [40_000, 40_000], torch.Generator().manual_seed(0))
    moments = known.moments("default")
    covariances = [m.directions.T @ m.directions + torch.diag(m.left**2) for m in moments]
    scale = torch.stack(
        [m.mean.square().mean() + c.diag().mean() for m, c in zip(moments, covariances, strict=True)]
    ).mean()
    for drawn, own, n, mean in (
        (few, covariances[0], 50, moments[0].mean),
        (many, covariances[1], 900, moments[1].mean),
    ):
        share = 100 / (100 + n)
        expected = (1 - share) * own + share * sum(covariances) / 2 + statistics.BLUR**2 * scale * torch.eye(64)
        torch.testing.assert_close(drawn.mean(dim=0), mean, atol=0.1, rtol=0)
        found = torch.cov(drawn.T)
        assert float((found - expected).norm() / expected.norm()) < 0.05


def test_draws_are_the_same_in_every_process_and_new_in_every_step() -> None:
    pool, _ = pool_of_clouds([20, 30])
    known = pool.base_model.pool.statistics
    first, again, other = (known.draw("default", [5, 0], torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    assert first[1].shape == (0, 64)


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_old_statistics_keep_every_byte(router: str, tmp_path) -> None:
    pool = build_pool("llama", ["a"], router=router)
    known = {}
    for name in ("b", "c", "d"):
        current = pool.current_task
        if router == "ridge" and not pool.base_model.router.is_fitted("default"):
            pool.fit_router([padded(token_rows([4, 5, 6, 7], seed=len(known)))])
        step(pool)
        commit(pool, seed=len(known))
        known[current] = {k: digest(v) for k, v in pool.task_state(current).items() if "statistics" in k}
        assert known[current]
        grow(pool, name)
    pool.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pool.unload(), tmp_path, is_trainable=True)
    commit(loaded, seed=9)
    loaded.add_task("e")
    for name, found in known.items():
        assert {k: digest(v) for k, v in loaded.task_state(name).items() if "statistics" in k} == found
    loaded.remove_task("b")
    assert {k: digest(v) for k, v in loaded.task_state("c").items() if "statistics" in k} == known["c"]
    assert loaded.base_model.pool.statistics.known("default") == [True, True, True, False]


def test_a_stream_held_by_statistics(tmp_path) -> None:
    """Every new task gets its weight, old ones keep theirs, and neither a row nor a text of any task is stored."""
    arm = ArmCallback(tokenizer(), replay="statistics")
    model, scales = learn_stream(tmp_path, arm)
    assert model.committed_tasks == TASKS and model.base_model.pool.config.replay_rows == [0, 0, 0]
    assert "sapt_replay.default.weight" not in " ".join(model.state_dict())
    for task, (leading, mean) in own_weights(model).items():
        assert leading >= 0.95 and mean >= 0.5, (task, leading, mean)
    for task in TASKS[1:]:
        assert min(scales[task]) >= 0.5, scales
    assert arm.reports["a"]["statistics_of"] > 0 and not arm.pseudo_samples


def test_without_statistics_nothing_is_kept(tmp_path) -> None:
    model = fresh_pool(statistics_rank=0)
    trainer(model, tmp_path, "a", [ArmCallback(tokenizer(), replay="rows")]).train()
    assert not model.base_model.pool.statistics.known("default")[0]
    assert not bool(model.base_model.pool.statistics.sapt_statistics["default"].weight.any())
    with pytest.raises(ReflectionError, match="statistics_rank"):
        ArmCallback(tokenizer()).prepare(fresh_pool(statistics_rank=0), [prompts_of("a", seed=0)])


def test_resumed_training_draws_the_same(tmp_path) -> None:
    """Bit by bit what an uninterrupted run ends with, with draws in every step."""

    def opened():
        model = fresh_pool()
        trainer(model, tmp_path / "first", "a", [ArmCallback(tokenizer())], max_steps=4).train()
        model.add_task("b")
        return model

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = opened()
    trainer(whole, tmp_path / "whole", "b", [ArmCallback(tokenizer())], **settings).train()
    resumed = opened()
    run = trainer(resumed, tmp_path / "whole", "b", [ArmCallback(tokenizer())], **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = whole.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_draw_is_no_training_prompt() -> None:
    """What statistics give away: draws are no nearer to training prompts than these are to one another."""
    pool = fresh_pool()
    rows = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows_of("a")]
    pooled = pool.pooled_prompts(rows)
    pool.commit_task(pooled, replay=pooled[:2])
    drawn = pool.base_model.pool.statistics.draw("default", [200], torch.Generator().manual_seed(0))[0]
    to_training = torch.cdist(drawn, pooled).amin(dim=1)
    between = torch.cdist(pooled, pooled).fill_diagonal_(torch.inf).amin(dim=1)
    assert float(to_training.min()) > float(between.median()) * 0.5


def test_joined_moments_are_those_of_all_rows() -> None:
    x, y = cloud(60, 10), cloud(40, 10, seed=1) + 1.0
    found, expected = Moments.of(x, 10).joined(Moments.of(y, 10)), Moments.of(torch.cat([x, y]), 10)
    assert found.rows == 100
    torch.testing.assert_close(found.mean, expected.mean, atol=1e-5, rtol=1e-4)
    mine, all_rows = (m.directions.T @ m.directions + torch.diag(m.left**2) for m in (found, expected))
    assert float((mine - all_rows).norm() / all_rows.norm()) < 0.03  # n - 1 in place of n


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_reopened_task_knows_old_prompts_and_new_ones(router: str) -> None:
    """New prompts alone are shown, twice: both kinds lead to the task, and neither is a stranger."""
    pool, arm = fresh_pool(router=router), ArmCallback(tokenizer())
    for name in ("a", "b"):
        if name not in pool.tasks:
            pool.add_task(name)
        arm.prepare(pool, [prompts_of(name, seed=0)])
        arm.reflect(pool)
    pool.reopen_task(forget=True)
    for _ in range(2):
        arm.prepare(pool, [prompts_of("c", seed=0)])  # of another kind than b's
    arm.reflect(pool)
    assert pool.committed_tasks == ["a", "b"] and not pool.base_model.pool.statistics.reopened
    for name, wanted in (("a", 0), ("b", 1), ("c", 1)):
        weights = pool.eval().attention_weights(**prompts_of(name, seed=3))
        assert float((weights.argmax(dim=1) == wanted).float().mean()) > 0.9, name
        assert float((weights.sum(dim=1) == 0).float().mean()) < 0.1, name
