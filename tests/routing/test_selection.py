"""Leaving out blocks that hardly count: top_k, min_weight, the bound on their effect, factors held with a cache."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor

from helpers.tiny import CACHE, assert_real_pool, build_pool, grow, padded, token_rows
from peft_sapt import layer as layer_module
from peft_sapt.layer import SaptLayer
from peft_sapt.ops import reference
from peft_sapt.ops.bound import block_norms, dropped_bound
from peft_sapt.routing.caches import kept_with
from peft_sapt.routing.mixture import STACK_AT_MOST, Mixture
from peft_sapt.routing.weights import select

TASKS = [f"t{i}" for i in range(12)]


@settings(max_examples=200)
@given(
    scores=st.lists(st.floats(-8, 8), min_size=1, max_size=9),
    top_k=st.none() | st.integers(1, 10),
    min_weight=st.floats(0, 0.99),
)
def test_selection_keeps_the_largest_unchanged(scores: list[float], top_k: int | None, min_weight: float) -> None:
    weights = torch.tensor([scores], dtype=torch.float64).softmax(dim=-1)
    kept = select(weights, top_k, min_weight)
    stays = kept != 0
    assert torch.equal(kept[stays], weights[stays])
    assert float(kept.max()) == float(weights.max())
    assert top_k is None or int(stays.sum()) <= top_k
    assert bool((kept[stays] >= min(min_weight, float(weights.max()))).all())
    dropped = ~stays & (weights > 0)
    if top_k is None and dropped.any():
        assert float(weights[dropped].max()) < min_weight
    if dropped.any() and stays.any():
        assert float(weights[dropped].max()) <= float(kept[stays].min())


def test_kept_weights_are_scaled_to_the_sum_of_all() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0], [0.1, 0.1, 0.8]])  # the second row is a stranger's
    two = torch.tensor([[0.625, 0.375, 0.0], [0.0, 0.0, 0.0], [1 / 9, 0.0, 8 / 9]])
    torch.testing.assert_close(select(weights, 2, 0.0, renormalize=True).sort(dim=1)[0], two.sort(dim=1)[0])
    one = select(weights, 1, 0.0, renormalize=True)
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    assert torch.equal(select(weights, None, 0.0, renormalize=True), weights), "nothing is left out"


def test_hard_selection_answers_as_the_leading_task_does() -> None:
    pool = build_pool("llama", TASKS, top_k=1, renormalize=True).eval()
    prompts = padded(token_rows([6, 9]))
    leads = pool.attention_weights(**prompts).argmax(dim=1).tolist()
    with torch.no_grad():
        found, named = pool(**prompts).logits, pool(**prompts, sapt_task=[TASKS[i] for i in leads]).logits
    torch.testing.assert_close(found, named, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranks", [[4, 4, 4], [1, 5, 2, 7]])
def test_norms_are_those_of_the_products(ranks: list[int]) -> None:
    a = [torch.randn(r, 20) for r in ranks]
    b = [torch.randn(r, 11) for r in ranks]
    expected = torch.stack([torch.linalg.matrix_norm((q.mT @ p).double(), ord=2) for p, q in zip(a, b, strict=True)])
    torch.testing.assert_close(block_norms(a, b), expected, rtol=1e-5, atol=0)


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), top_k=st.integers(1, 6))
def test_the_bound_holds_and_can_be_reached(seed: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a, b = [random(3, 16) for _ in range(6)], [random(3, 10) for _ in range(6)]
    scaling = [0.5 + t for t in range(6)]
    weights = random(1, 6).softmax(dim=-1)
    x, base = random(1, 5, 16), random(1, 5, 10)
    kept = select(weights, top_k, 0.0)

    def y(x: torch.Tensor, base: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return reference.weighted_lora(x, base, a, [t.mT for t in b], w, scaling)

    bound = dropped_bound(weights[0], kept[0] == 0, block_norms(a, b), scaling)
    moved = (y(x, base, weights) - y(x, base, kept)).norm(dim=-1)
    assert bool((moved <= bound * x.norm(dim=-1) * (1 + 1e-9)).all())
    only = torch.tensor([[1.0, 0, 0, 0, 0, 0]], dtype=torch.float64)  # one dropped block: its worst direction
    worst = torch.linalg.svd(b[0].mT @ a[0]).Vh[0].view(1, 1, -1)
    moved_most = y(worst, base[:, :1] * 0, only).norm()
    assert float(moved_most) == pytest.approx(dropped_bound(only[0], only[0] > 0, block_norms(a, b), scaling))


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_k": 2}, {"min_weight": 0.2}])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_config_cuts_the_weights_of_an_answer_and_not_of_training(family: str, setting: dict) -> None:
    exact, cut = build_pool(family, ["a", "b", "c"]).eval(), build_pool(family, ["a", "b", "c"], **setting).eval()
    inputs = padded(token_rows([5, 9, 7]))
    if family == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    weights = exact.attention_weights(**{k: v for k, v in inputs.items() if "decoder" not in k})
    assert_real_pool(weights)
    kept = select(weights, setting.get("top_k"), setting.get("min_weight", 0.0))
    assert int((kept == 0).sum()) > 0
    with torch.no_grad():
        by_config, by_hand = cut(**inputs).logits, exact(**inputs, sapt_weights=kept).logits
        assert torch.equal(by_config, by_hand)
        assert not torch.equal(by_config, exact(**inputs).logits)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    inputs.pop("decoder_input_ids", None)
    losses = [model.train()(**inputs, labels=labels).loss for model in (exact, cut)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_held_cache_keeps_only_the_blocks_that_count(family: str) -> None:
    pool = build_pool(family, TASKS, min_weight=0.25).eval()
    exact = build_pool(family, TASKS).eval()
    prompts = padded(token_rows([6]))
    kept = select(exact.attention_weights(**prompts), None, 0.25)
    settings_ = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    used = set()

    def watched(self, *args, **kwargs):
        mixture = self.forward_state.mixture
        if mixture is not None and mixture.few_scales is not None:
            used.add(mixture.few_scales.shape[-1])
        return gathered(self, *args, **kwargs)

    layer = next(type(m) for m in pool.modules() if isinstance(m, SaptLayer))
    gathered, layer.forward = layer.forward, watched
    try:
        answer = pool.generate(**prompts, **settings_)
    finally:
        layer.forward = gathered
    count = [r for r, w in zip(pool.peft_config["default"].task_ranks, kept[0].tolist(), strict=True) if w > 0]
    assert used == {sum(count)}
    # the same tokens without a cache, each from a whole forward over all blocks with the same weights
    slow = exact.generate(**prompts, **settings_, sapt_weights=kept, use_cache=False)
    assert torch.equal(answer, slow)


def test_rows_gather_the_blocks_of_all_of_them() -> None:
    pool = build_pool("llama", TASKS).eval()
    prompts = padded(token_rows([6, 6]))
    names = ["t3", "t9"]
    with torch.no_grad():
        output = pool(**prompts, sapt_task=names, use_cache=True)
        following = {"input_ids": torch.tensor([[5], [6]]), CACHE: output[CACHE]}
        mixed = pool(**following).logits
        mixture = kept_with(output[CACHE]).mixture
        ranks = pool.peft_config["default"].task_ranks
        assert mixture.few_scales.shape == (2, ranks[3] + ranks[9])
        for row, name in enumerate(names):
            single = pool(**{k: v[row : row + 1] for k, v in prompts.items()}, sapt_task=name, use_cache=True)
            alone = pool(input_ids=following["input_ids"][row : row + 1], **{CACHE: single[CACHE]})
            torch.testing.assert_close(mixed[row : row + 1], alone.logits, atol=1e-5, rtol=1e-4)


def test_gathered_factors_follow_their_blocks() -> None:
    """A block that changes while a cache is held is read anew; a copy of the cache starts without the old rows."""
    pool = build_pool("llama", TASKS).eval()
    prompts = padded(token_rows([6]))
    newest = {"sapt_task": TASKS[-1]}

    def next_logits(cache) -> torch.Tensor:
        with torch.no_grad():
            logits = pool(input_ids=torch.tensor([[7]]), **{CACHE: cache}).logits
        cache.crop(-1)
        return logits

    with torch.no_grad():
        cache = pool(**prompts, **newest, use_cache=True)[CACHE]
        twin = copy.deepcopy(cache)
        before = next_logits(cache)
        assert torch.equal(before, next_logits(cache))
        assert torch.equal(before, next_logits(twin))
        for name, parameter in pool.named_parameters():
            if ".sapt_B." in name:
                parameter.mul_(3.0)
        after = next_logits(cache)
        assert not torch.equal(before, after)
        assert torch.equal(after, next_logits(copy.deepcopy(cache)))


def test_a_wide_mixture_is_not_gathered() -> None:
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    prompts = padded(token_rows([6, 8]))
    with torch.no_grad():
        cache = pool(**prompts, use_cache=True)[CACHE]
        pool(input_ids=torch.tensor([[5], [6]]), **{CACHE: cache})
    assert kept_with(cache).mixture.rows is None


def written_equals_forward(pool, prompts: dict) -> None:
    """Two tokens written from held factors have the logits of whole forwards, which take the blocks as they lie."""
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True}
    found = pool.generate(**prompts, **options, return_dict_in_generate=True)
    with torch.no_grad():
        weights = pool.attention_weights(**prompts)
        whole = pool(input_ids=found.sequences[:, :-1], sapt_weights=weights).logits[:, -2:]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), whole, atol=1e-4, rtol=1e-4, check_dtype=False)


def change_in_place(pool) -> None:
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            if ".sapt_old_B." in name:
                parameter.mul_(3.0)


def change_data(pool) -> None:
    for name, parameter in pool.named_parameters():
        if ".sapt_B." in name:
            parameter.data = -parameter.data


def change_data_in_place(pool) -> None:
    for name, parameter in pool.named_parameters():
        if ".sapt_B." in name:
            parameter.data.mul_(-2.0)  # as moving averages do: leaves no trace in the version counter


def train_a_step(pool) -> None:
    """In eval mode, with the Trainer's default optimizer, whose fused steps leave no trace either."""
    trained = [p for p in pool.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)
    pool(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[-100, -100, 7, 8]])).loss.backward()
    optimizer.step()


def write_to_views(pool) -> None:
    for view in pool.task_state("c").values():
        view.mul_(-3.0)


CHANGES = {
    "in place": change_in_place,
    "another tensor": change_data,
    "its data in place": change_data_in_place,
    "a training step": train_a_step,
    "views of a task": write_to_views,
    "another dtype": lambda pool: pool.double(),
    "a new task": lambda pool: grow(pool, "d"),
    "a removed task": lambda pool: pool.remove_task("a"),
    "another pool": lambda pool: (pool.add_adapter("other", copy.deepcopy(pool.peft_config["default"])),
                                  pool.set_adapter("other")),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_stacks_of_a_small_pool_follow_every_change(change: str) -> None:
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    prompts = padded(token_rows([6, 6]))
    assert_real_pool(pool.attention_weights(**prompts))
    written_equals_forward(pool, prompts)
    CHANGES[change](pool)
    written_equals_forward(pool, prompts)
    assert pool.base_model.hooks.state.session is None


@pytest.mark.parametrize("change", [change_data_in_place, train_a_step])
def test_a_kept_cache_reads_the_newest_block_as_it_is(change) -> None:
    pool = build_pool("llama", TASKS).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        cache = pool(input_ids=ids, sapt_task=TASKS[-1], use_cache=True)[CACHE]
        pool(input_ids=ids[:, :1], **{CACHE: cache})
    change(pool)
    with torch.no_grad():
        twin = copy.deepcopy(cache)
        found = pool(input_ids=ids[:, :1], **{CACHE: cache}).logits
        assert torch.equal(found, copy.deepcopy(pool)(input_ids=ids[:, :1], **{CACHE: twin}).logits)


class Watch(LogitsProcessor):
    """Calls ``look`` before each token."""

    def __init__(self, look) -> None:
        self.look = look

    def __call__(self, ids, scores):
        self.look(ids, scores)
        return scores


@pytest.mark.parametrize(("count", "stacked"), [(3, True), (60, False)])
def test_a_large_pool_is_not_stored_twice(count: int, stacked: bool) -> None:
    pool = build_pool("llama", [f"t{i}" for i in range(count)]).eval()
    assert (sum(pool.peft_config["default"].task_ranks) <= STACK_AT_MOST) == stacked
    prompts = padded(token_rows([6, 6]))
    written_equals_forward(pool, prompts)
    seen = []
    look = Watch(lambda *_: seen.append(len(pool.base_model.hooks.state.session.stacks)))
    pool.generate(**prompts, max_new_tokens=2, logits_processor=[look])
    layers = sum(isinstance(m, SaptLayer) for m in pool.modules())
    assert set(seen) == {layers if stacked else 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_makes_its_stack_once(dtype: torch.dtype, monkeypatch) -> None:
    """Also where the base is bfloat16 and blocks are float32, and the tokens are those of the long way."""
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    for name, parameter in pool.named_parameters():
        if ".sapt_" not in name:
            parameter.data = parameter.data.to(dtype)
    made, short, prompts = [], [], padded(token_rows([6, 6]))
    factors, held = Mixture.factors, layer_module.held_lora
    monkeypatch.setattr(Mixture, "factors", lambda *a: made.append(0) or factors(*a))
    monkeypatch.setattr(layer_module, "held_lora", lambda *a: short.append(a[1].dtype) or held(*a))
    tokens = pool.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    layers = sum(isinstance(m, SaptLayer) for m in pool.modules())
    assert len(made) == layers and short == [dtype] * (4 * layers)
    monkeypatch.setattr("peft_sapt.routing.mixture.STACK_AT_MOST", 0)
    assert torch.equal(pool.generate(**prompts, max_new_tokens=5, min_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("ranks", [[2, 3, 4], [5, 2, 1]])
def test_another_pool_answers_for_itself_inside_a_generation(ranks: list[int]) -> None:
    """As in contrastive decoding, where each token compares two models."""
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    other = copy.deepcopy(pool.peft_config["default"])
    other.task_ranks = ranks
    pool.add_adapter("other", other)
    twin = copy.deepcopy(pool)
    twin.set_adapter("other")
    prompts = padded(token_rows([6, 6]))
    plain = pool.generate(**prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    def look(ids, scores) -> None:
        pool.set_adapter("other")
        found = pool(input_ids=ids).logits[:, -1]
        pool.set_adapter("default")
        torch.testing.assert_close(found, twin(input_ids=ids).logits[:, -1], atol=1e-5, rtol=1e-4)
        by_hand = pool(input_ids=ids, sapt_task="a").logits[:, -1]
        assert not torch.allclose(by_hand, scores, atol=1e-3)

    settings_ = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    assert torch.equal(pool.generate(**prompts, **settings_, logits_processor=[Watch(look)]), plain)


@pytest.mark.parametrize("beams", [1, 2])
def test_weights_of_zero_leave_the_base_model(beams: int) -> None:
    pool = build_pool("llama", ["a", "b", "c"]).eval()
    settings_ = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    prompts = padded(token_rows([6, 4]))
    found = pool.generate(**prompts, **settings_, sapt_weights=[0.0, 0.0, 0.0])
    with pool.disable_adapter():
        assert torch.equal(found, pool.generate(**prompts, **settings_))
