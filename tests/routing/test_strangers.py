"""Prompts that no task claims: told by a regression recomputed here, and answered by the base model bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from transformers import StaticCache

from helpers.tiny import CACHE, build_pool, labelled, padded, token_rows
from helpers.training import TASKS, fresh_pool, prompts_of, trainer
from helpers.words import tokenizer
from peft_sapt import ArmCallback
from peft_sapt.arm.everyday import everyday_prompts
from peft_sapt.errors import PromptError, TaskError
from peft_sapt.routing import strangers
from peft_sapt.routing.moments import Moments

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
OTHERS = [padded(token_rows([7] * 24, seed=50 + i)) for i in range(2)]  # in two "forms"


def rows_from(mean: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    return mean + torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_a_weighted_ridge_regression() -> None:
    """By brute force: all rows stacked, each class weighing the same, one-hot labels."""
    d, means = 6, torch.eye(6) * 4
    tasks, background = [rows_from(means[i], 300, i) for i in range(2)], [rows_from(means[3], 80, 9)]
    x = torch.cat([strangers.with_one(rows) for rows in (*tasks, *background)])
    weights = torch.cat([torch.full((len(rows),), 1 / len(rows)) for rows in (*tasks, *background)]).double()
    labels = torch.block_diag(*[torch.ones(len(rows), 1) for rows in (*tasks, *background)]).double()
    gram = (x * weights[:, None]).T @ x
    gram += strangers.RIDGE * gram.trace() / (d + 1) * torch.eye(d + 1).double()
    expected = torch.linalg.solve(gram, (x * weights[:, None]).T @ labels).T
    found = strangers.detector([Moments.of(rows, d) for rows in tasks], background, d + 1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)  # a covariance divides by n - 1
    margins = strangers.margins(tasks[0], found, 2)
    scores = strangers.with_one(tasks[0]) @ expected.T
    torch.testing.assert_close(margins, scores[:, :2] - scores[:, 2:], atol=1e-2, rtol=0)


def test_left_out_prompts_are_left_out() -> None:
    """Each margin is that of a regression made without the row's fold."""
    own, other, background = (rows_from(torch.zeros(5), n, s) for n, s in ((20, 1), (30, 2), (40, 3)))
    own, groups = torch.cat([own, own + 0.01]), torch.arange(20).repeat(2)  # each prompt in two renderings
    known, rank = Moments.of(other, 5), 5
    found = strangers.left_out_margins(own, groups, [known], [background], rank)
    expected, numbers = [], strangers.folds_of(20)[groups]
    for fold in range(strangers.FOLDS):
        left = numbers == fold
        weights = strangers.detector([known, Moments.of(own[~left], rank)], [background], 6)
        expected.append(strangers.margins(own[left], weights, 2).amax(dim=1))
    torch.testing.assert_close(found, torch.cat(expected))
    assert not len(strangers.left_out_margins(own[:2], torch.tensor([0, 0]), [known], [background], rank))


def test_copies_of_prompts_move_no_limit() -> None:
    """As an epoch shows them again and again: a copy of a row that is left out is left out too."""
    found = []
    for copies in (1, 5):
        pool = build_pool("llama", ["a"])
        pool.fit_background(OTHERS)
        pooled = pool.pooled_prompts([shown(0)]).repeat(copies, 1)
        pool.commit_task(pooled, replay=pooled[:2])
        found.append(pool.base_model.pool.statistics.sapt_counts["default"].weight.clone())
    assert torch.equal(*found)


def test_a_related_task_sends_no_own_prompts_away() -> None:
    """Limits are found out again as tasks come: a task that is like an older one lowers the scores of both."""
    pool = build_pool("llama", ["a"])
    pool.fit_background(OTHERS)
    for i, name in enumerate("abc"):
        if i:
            pool.add_task(name)
        rows = token_rows([7] * 60, seed=i)
        pool.commit_task([padded([[10 + token % 12 for token in row] for row in rows])], replay=[shown(0)])
    fresh = padded([[10 + token % 12 for token in row] for row in token_rows([7] * 200, seed=9)])
    away = pool.eval().attention_weights(**fresh).sum(dim=1) == 0
    assert float(away.float().mean()) <= 0.02


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_task_of_one_prompt(router: str, tmp_path) -> None:
    pool = pool_with_strangers(router=router)
    pool.export_task("a", tmp_path)
    one = padded([[90, 91, 92]])
    pool.import_task("d", tmp_path, inputs=[one])
    pool.commit_task(inputs=[one], replay=[one])
    assert pool.committed_tasks[-1] == "d" and pool.base_model.pool.statistics.known("default")[-1]
    assert bool(pool.eval().attention_weights(**one).any())


def test_prompts_that_are_given_at_the_commit_count() -> None:
    """Not those of an attempt before, which may have been another data set."""
    pool, arm = fresh_pool(), ArmCallback(tokenizer())
    arm.prepare(pool, [prompts_of("a", seed=0)])
    pool.commit_task([prompts_of("c", seed=0)])
    pool.eval()
    assert float((pool.attention_weights(**prompts_of("c", seed=1)).sum(dim=1) == 0).float().mean()) <= 0.05


def test_a_task_that_comes_back_is_no_stranger_to_itself() -> None:
    pool = pool_with_strangers()
    fresh = padded([row for i in range(2) for row in token_rows([7] * 100, seed=50 + i)])
    before = float((pool.attention_weights(**fresh).sum(dim=1) == 0).float().mean())
    forms = len(pool.base_model.pool.config.background_rows)
    pool.remove_task("c")
    assert len(pool.base_model.pool.config.background_rows) == forms + 1
    pool.add_task("c")
    assert len(pool.base_model.pool.config.background_rows) == forms
    pool.commit_task([shown(2)], replay=[shown(2)])
    after = float((pool.eval().attention_weights(**fresh).sum(dim=1) == 0).float().mean())
    assert before > 0.9 and after > 0.9


def test_a_number_spares_tasks_of_which_nothing_is_known() -> None:
    pool = pool_with_strangers()
    pool.add_task("d")
    pool.peft_config["default"].fallback = 0.3
    assert bool(pool.eval().attention_weights(**padded([[90, 91, 92]])).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pool_that_was_cast_goes_on(dtype: torch.dtype) -> None:
    pool = pool_with_strangers().to(dtype)
    drawn = pool.base_model.pool.statistics.draw("default", [3, 3, 3], torch.Generator().manual_seed(0))
    assert all(bool(rows.isfinite().all()) for rows in drawn)
    batch, _ = mixed()
    assert bool(pool.attention_weights(**batch).isfinite().all())


def test_the_limit_lets_few_everyday_prompts_through() -> None:
    """Of the worst form at most the wanted share, and of fresh ones about as many."""
    tasks = [Moments.of(rows_from(torch.full((8,), 1.0 + i), 60, i), 8) for i in range(2)]
    background = [rows_from(torch.zeros(8), 400, 10), rows_from(torch.full((8,), -1.0), 400, 11)]
    limit = strangers.background_limit(tasks, background)
    weights = strangers.detector(tasks, background, 9)
    for i, mean in enumerate((torch.zeros(8), torch.full((8,), -1.0))):
        fresh = strangers.margins(rows_from(mean, 2000, 20 + i), weights, 2).amax(dim=1)
        assert float((fresh >= limit).double().mean()) < 2 * strangers.EVERYDAY_CLAIMED


def pool_with_strangers(family: str = "llama", **config):
    """A pool of three tasks that claim only the prompts they were shown, and two of these with two strangers."""
    pool = build_pool(family, ["a"], **config)
    for i, name in enumerate("abc"):
        if i:
            pool.add_task(name)
        if config.get("router") == "ridge" and not pool.base_model.router.is_fitted("default"):
            pool.fit_router([shown(i)])
        pool.commit_task([shown(i)], replay=[shown(i)])
    for module in pool.modules():  # a fresh block is the identity
        for part in ("sapt_B", "sapt_old_B"):
            if hasattr(module, part):
                torch.nn.init.normal_(getattr(module, part)["default"].weight, std=0.3)
    pool.fit_background(OTHERS)
    return pool.eval()


def shown(i: int) -> dict[str, torch.Tensor]:
    return padded([[10 + 20 * i + token % 12 for token in row] for row in token_rows([7] * 24, seed=i)])


def mixed() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two known prompts and two strangers in turns, and which are strangers."""
    known, other = shown(1)["input_ids"][:2], OTHERS[0]["input_ids"][:2]
    rows = torch.stack([known[0], other[0], known[1], other[1]]).tolist()
    return padded([row[: 7 - i % 2] for i, row in enumerate(rows)]), torch.tensor([False, True, False, True])


CASES = [("llama", "attention", "lora"), ("llama", "ridge", "lora"), ("t5", "attention", "lora"),
         ("llama", "attention", "prompt"), ("t5", "ridge", "prompt")]  # fmt: skip


@pytest.mark.parametrize("family, router, block", CASES)
def test_a_stranger_gets_the_base_models_answer(family: str, router: str, block: str) -> None:
    """Logits, greedy tokens, beams and a static cache, beside rows that the pool answers."""
    pool = pool_with_strangers(
        family, router=router, block=block, **({"num_virtual_tokens": 3} if block == "prompt" else {})
    )
    batch, stranger = mixed()
    weights = pool.attention_weights(**batch)
    assert torch.equal(weights.sum(dim=1) == 0, stranger)
    extra = {"decoder_input_ids": batch["input_ids"][:, -2:]} if family == "t5" else {}
    with torch.no_grad():
        found = pool(**batch, **extra).logits
        with pool.disable_adapter():
            base = pool(**batch, **extra).logits
    attended = slice(None) if family == "t5" else batch["attention_mask"].bool()[1]
    if block == "lora":
        assert torch.equal(found[1], base[1]) and torch.equal(found[3], base[3])
    torch.testing.assert_close(found[1][attended], base[1][attended], atol=1e-5, rtol=1e-4)
    assert float((found[0] - base[0]).abs().max()) > 1e-3
    ways = [{}, {"num_beams": 3}] if block == "prompt" else [{}, {"num_beams": 3}, {"cache_implementation": "static"}]
    for settings in ways:
        told = pool.generate(**batch, **GREEDY, **settings)[:, -6:]
        with pool.disable_adapter():
            plain = pool.generate(**batch, **GREEDY, **settings)[:, -6:]
        assert torch.equal(told[stranger], plain[stranger]), settings


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_the_settings_of_fallback(router: str, tmp_path) -> None:
    pool = pool_with_strangers(router=router)
    batch, stranger = mixed()
    config, told = pool.peft_config["default"], lambda model: model.attention_weights(**batch).sum(dim=1) == 0
    assert config.fallback == "auto" and torch.equal(told(pool), stranger)
    pool.save_pretrained(tmp_path)
    config.fallback = None
    assert not bool(told(pool).any())
    config.fallback = 1e6
    assert bool(told(pool).all())
    config.fallback = -1e6
    assert not bool(told(pool).any())
    base = pool.unload()
    for value, expected in (
        ("auto", stranger),
        (None, torch.zeros(4, dtype=torch.bool)),
        (1e6, torch.ones(4, dtype=torch.bool)),
    ):
        loaded = PeftModel.from_pretrained(base, tmp_path, fallback=value).eval()
        assert torch.equal(told(loaded), expected)
        base = loaded.unload()


def test_training_rows_are_never_strangers_and_evaluation_follows_inference() -> None:
    pool = pool_with_strangers()
    pool.add_task("d")
    batch = labelled("llama", [row.tolist() for row in OTHERS[0]["input_ids"][:3]])
    seen, use = [], pool.base_model.hooks.state.use
    pool.base_model.hooks.state.use = lambda mixture: (seen.append(mixture.weights.detach().clone()), use(mixture))
    pool.train()(**batch)
    assert bool((seen[-1].sum(dim=1) > 0.99).all())
    with torch.no_grad():
        pool.eval()(**batch)
    assert bool((seen[-1].sum(dim=1) > 0.99).all()), "a task without statistics may claim anything"
    pool.base_model.pool.statistics.fit("default", pool.pooled_prompts([shown(3)]))
    with torch.no_grad():
        pool(**batch)
    assert not bool(seen[-1].any())


def test_a_task_without_statistics_knows_no_strangers_until_it_has_them(tmp_path) -> None:
    pool = pool_with_strangers()
    batch, stranger = mixed()
    told = lambda: pool.attention_weights(**batch).sum(dim=1) == 0  # noqa: E731
    pool.export_task("a", tmp_path)
    pool.import_task("d", tmp_path)
    assert not bool(told().any())
    pool.remove_task("d")
    assert torch.equal(told(), stranger)
    pool.import_task("d", tmp_path, inputs=[shown(3)])
    assert torch.equal(told(), stranger)
    pool.commit_task()
    assert pool.committed_tasks == ["a", "b", "c", "d"] and torch.equal(told(), stranger)


def test_prompts_of_a_removed_task_are_strangers(tmp_path) -> None:
    pool = pool_with_strangers()
    kept = copy.deepcopy(pool)
    assert float((pool.attention_weights(**shown(1)).sum(dim=1) == 0).float().mean()) < 0.1
    pool.remove_task("b")
    away = (pool.attention_weights(**shown(1)).sum(dim=1) == 0).float().mean()
    assert float(away) > 0.9
    assert float((pool.attention_weights(**shown(0)).sum(dim=1) == 0).float().mean()) < 0.1
    pool.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kept.unload(), tmp_path).eval()
    assert torch.equal(loaded.attention_weights(**shown(1)), pool.attention_weights(**shown(1)))
    other = pool_with_strangers()
    other.remove_task("b", forget=True)
    assert len(other.base_model.pool.config.background_rows) == 2


def test_a_chat_of_a_stranger_stays_the_base_models() -> None:
    pool = pool_with_strangers()
    ids = OTHERS[0]["input_ids"][:1]
    turn = torch.tensor([[11, 12]])
    plain, found = [], []
    for model, kept in ((pool, found), (pool, plain)):
        cache = StaticCache(config=model.get_base_model().config, max_cache_len=24)
        with torch.no_grad(), model.disable_adapter() if kept is plain else torch.no_grad():
            kept.append(model(input_ids=ids, **{CACHE: cache}).logits)
            kept.append(model(input_ids=turn, attention_mask=torch.ones(1, 9), **{CACHE: cache}).logits)
    assert all(torch.equal(x, y) for x, y in zip(plain, found, strict=True))


def test_arm_shows_everyday_prompts_and_leaves_their_like_to_the_base(tmp_path) -> None:
    """Own prompts, unseen ones too, stay with the pool; other prompts of the same words do not."""
    model, arm = fresh_pool(), ArmCallback(tokenizer())
    for name in TASKS[:2]:
        if name not in model.tasks:
            model.add_task(name)
        trainer(model, tmp_path, name, [arm], max_steps=5).train()
    model.eval()
    config = model.base_model.pool.config
    assert config.background_rows and len(config.background_rows) == len(config.background_forms)
    for name in TASKS[:2]:
        own = prompts_of(name, seed=9)
        assert float((model.attention_weights(**own).sum(dim=1) == 0).float().mean()) <= 0.05
    asked = [tokenizer()(text).input_ids for text in everyday_prompts()[::10]]
    other = model.attention_weights(**padded([row for row in asked if row])).sum(dim=1) == 0
    assert float(other.float().mean()) > 0.9


def test_refusals() -> None:
    pool = build_pool("llama", ["a", "b"])
    with pytest.raises(PromptError, match="at least two prompts in each form"):
        pool.fit_background([padded(token_rows([4]))])
    with pytest.raises(PromptError, match="no prompt token"):
        pool.fit_background([[{**padded(token_rows([4, 5])), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}]])
    none = build_pool("llama", ["a", "b"], statistics_rank=0)
    with pytest.raises(TaskError, match="statistics_rank=0"):
        none.fit_background(OTHERS)
    assert not pool.base_model.pool.statistics.background("default")
