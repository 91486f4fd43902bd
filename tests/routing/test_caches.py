"""Weights follow a cache whatever its name and class, and its rows wherever they go, or the forward refuses."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from transformers import StaticCache
from transformers.modeling_outputs import BaseModelOutput

from helpers.families import FAMILIES, pool_of
from helpers.tiny import CACHE, PAD, build_pool, padded, token_rows
from peft_sapt.errors import WeightsError
from peft_sapt.routing.caches import cache_among, is_filled, kept_with

TASKS = ["a", "b", "c"]
PROMPTS = torch.tensor(token_rows([9, 9, 9], seed=3))
NEXT = torch.tensor([[17], [23], [31]])


def filled(pool: PeftModel, **given: Any) -> tuple[str, Any]:
    """Name and object of the cache that the prompts leave."""
    output = pool(PROMPTS, use_cache=True, **given)
    return next((name, output[name]) for name in output if name not in ("logits", "hidden_states"))


def reordered(cache: Any) -> None:
    if isinstance(cache, list):
        cache[:] = [tensor[[2, 0, 1]] for tensor in cache]
    else:
        cache.reorder_cache(torch.tensor([2, 0, 1]))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- by object, not by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_loop_keeps_the_prompts_weights(family: str, router: str) -> None:
    """Three tokens by hand, against the same with the prompts' weights given at each step."""
    pool = pool_of(family, router=router)
    weights = pool.attention_weights(PROMPTS)
    assert float(weights.std(dim=0).max()) > 0.01
    (name, own), (_, held) = filled(pool), filled(pool, sapt_weights=weights)
    for token in (NEXT, NEXT + 1, NEXT + 2):
        got = pool(token, **{name: own}, use_cache=True)
        expected = pool(token, **{name: held}, use_cache=True, sapt_weights=weights)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-6, rtol=0)
        own, held = got[name], expected[name]
    other = pool(NEXT, **{name: filled(pool)[1]}, use_cache=True, sapt_weights=weights.roll(1, dims=1)).logits
    assert float((other - pool(NEXT, **{name: filled(pool)[1]}, use_cache=True).logits).abs().max()) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_reordered_copied_or_somebody_elses(family: str) -> None:
    pool = pool_of(family)
    weights, order = pool.attention_weights(PROMPTS), [2, 0, 1]
    name, cache = filled(pool)
    reordered(cache)
    if isinstance(cache, list):  # new tensors, of which nothing is known
        with pytest.raises(WeightsError, match=rf"{name} was given, but it carries no attention weights"):
            pool(NEXT[order], **{name: cache}, use_cache=True)
    else:
        got = pool(NEXT[order], **{name: cache}, use_cache=True).logits
        _, known = filled(pool, sapt_weights=weights)
        reordered(known)
        expected = pool(NEXT[order], **{name: known}, use_cache=True, sapt_weights=weights[order]).logits
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    twin = copy.deepcopy(filled(pool)[1])
    if not isinstance(twin, list):
        again = pool(NEXT, **{name: twin}, use_cache=True).logits
        torch.testing.assert_close(again, pool(NEXT, **{name: filled(pool)[1]}, use_cache=True).logits)
    with pool.disable_adapter():
        foreign = filled(pool)[1]
    with pytest.raises(WeightsError, match=rf"{name} was given, but it carries no attention weights"):
        pool(NEXT, **{name: foreign}, use_cache=True)


def test_names_and_unnamed_objects() -> None:
    pool = pool_of("Llama")
    cache = pool(PROMPTS, use_cache=True)[CACHE]
    assert cache_among({"input_ids": PROMPTS, "past_key_values": cache}) == ("past_key_values", cache)
    assert cache_among({"anything": cache, "labels": None}) == ("anything", cache)
    assert cache_among({"encoder_outputs": cache, "use_cache": True}) == ("", None)
    assert is_filled(cache) and not is_filled(tf.DynamicCache()) and not is_filled(None)
    assert kept_with(tf.DynamicCache()) is None
    mamba = pool_of("Mamba")
    _, cache = filled(mamba)
    assert is_filled(cache)
    cache.reset()
    assert not is_filled(cache)


# --- rows that move --------------------------------------------------------------------------------------------------


def by_hand(order: list[int]) -> Callable[[Any], None]:
    def change(cache: Any) -> None:
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[order], layer.values[order]

    return change


MOVES: dict[str, tuple[list[int], Callable[[Any], None]]] = {
    "reorder_cache": ([2, 0, 1], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1]))),
    "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], lambda cache: cache.batch_repeat_interleave(2)),
    "batch_select_indices": ([1], lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    "a row dropped": ([0, 2], lambda cache: cache.batch_select_indices(torch.tensor([0, 2]))),
    "by hand": ([1, 1, 0], by_hand([1, 1, 0])),
    "as many rows as before": ([0, 0, 2], by_hand([0, 0, 2])),
    "cut back and reordered": (
        [2, 1, 0],
        lambda cache: (cache.crop(-2), cache.reorder_cache(torch.tensor([2, 1, 0]))),
    ),
}


@pytest.mark.parametrize("router", ["attention", "ridge"])
@pytest.mark.parametrize("block", ["lora", "prompt"])
@pytest.mark.parametrize("move", MOVES)
def test_weights_go_with_their_rows(move: str, block: str, router: str) -> None:
    order, change = MOVES[move]
    pool = build_pool("llama", TASKS, block=block, router=router).eval()
    weights = pool.attention_weights(PROMPTS)
    caches = [pool(PROMPTS, use_cache=True, **given)[CACHE] for given in ({}, {"sapt_weights": weights})]
    for cache in caches:
        change(cache)
    for token in (NEXT[order], NEXT[order] + 1):  # and stay with them
        got = pool(token, **{CACHE: caches[0]}).logits
        expected = pool(token, **{CACHE: caches[1]}, sapt_weights=weights[order]).logits
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_a_static_cache() -> None:
    pool = pool_of("Llama")
    weights, order = pool.attention_weights(PROMPTS), [2, 0, 1]

    def start(**given: Any) -> StaticCache:
        cache = StaticCache(config=pool.config, max_cache_len=16)
        pool(PROMPTS, **{CACHE: cache}, **given)
        return cache

    caches = [start(), start(sapt_weights=weights)]
    for cache in caches:
        cache.reorder_cache(torch.tensor(order))
    got = pool(NEXT[order], **{CACHE: caches[0]}).logits
    expected = pool(NEXT[order], **{CACHE: caches[1]}, sapt_weights=weights[order]).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    cache = start()
    cache.layers[-1].keys[:] = cache.layers[-1].keys[order]  # what was there is gone
    with pytest.raises(WeightsError, match=rf"{CACHE} was changed in place.*sapt_weights"):
        pool(NEXT, **{CACHE: cache})
    cache.reset()
    torch.testing.assert_close(pool(PROMPTS, **{CACHE: cache}).logits, pool(PROMPTS).logits, atol=1e-5, rtol=0)


def test_rows_exchanged_in_place_under_inference_mode() -> None:
    """Where torch counts no writes."""
    pool, order = pool_of("Llama"), [2, 0, 1]
    with torch.inference_mode():
        cache = pool(PROMPTS, use_cache=True)[CACHE]
        cache = pool(NEXT, **{CACHE: cache})[CACHE]  # untouched
        for layer in cache.layers:
            layer.keys[:], layer.values[:] = layer.keys[order], layer.values[order]
        with pytest.raises(WeightsError, match="changed in place"):
            pool(NEXT[order], **{CACHE: cache})


def test_rows_that_no_longer_tell_are_refused() -> None:
    pool = pool_of("Llama")
    cache = pool(PROMPTS, use_cache=True)[CACHE]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys * 1.01, layer.values * 1.01
    with pytest.raises(WeightsError, match=rf"Row 0 of {CACHE} is none of the rows"):
        pool(NEXT, **{CACHE: cache})
    same = PROMPTS[:1].repeat(2, 1)
    cache = pool(same, use_cache=True)[CACHE]
    kept = kept_with(cache)
    kept.mixture.weights = torch.eye(3)[:2]  # alike in all they hold, but for their weights
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(WeightsError, match="could be several"):
        pool(NEXT[:2], **{CACHE: cache})


@pytest.mark.parametrize("change", ["replaced", "repeated", "new object"])
def test_encoder_outputs(change: str) -> None:
    pool = build_pool("t5", TASKS).eval()
    batch, start = padded(token_rows([9, 9, 9], seed=3)), torch.tensor([[PAD, 5]])
    weights = pool.attention_weights(**batch)
    order = [0, 0, 1, 1, 2, 2] if change == "repeated" else [2, 0, 1]
    encoded = pool.get_base_model().get_encoder()(**batch)
    states = encoded.last_hidden_state[order]
    if change == "new object":
        encoded = BaseModelOutput(last_hidden_state=states)
    else:
        encoded.last_hidden_state = states
    inputs = {"encoder_outputs": encoded, "decoder_input_ids": start.repeat(len(order), 1)}
    if change == "new object":
        with pytest.raises(WeightsError, match="encoder_outputs was given, but it carries no attention weights"):
            pool(**inputs)
    else:
        expected = pool(**inputs, sapt_weights=weights[order]).logits
        torch.testing.assert_close(pool(**inputs).logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_second_generation_goes_on_with_the_cache_of_the_first(beams: int, implementation: str | None) -> None:
    """With the first one's weights; rows that a user moves in between are followed."""
    pool = pool_of("Llama")
    weights = pool.attention_weights(PROMPTS)
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "num_beams": beams}
    first = pool.generate(PROMPTS, cache_implementation=implementation, **settings)
    kept = kept_with(first[CACHE]).mixture.weights
    torch.testing.assert_close(kept, weights.repeat_interleave(len(kept) // 3, 0))
    if implementation is None:
        first[CACHE].reorder_cache(torch.arange(len(kept)).flip(0))
        pool(NEXT.repeat_interleave(len(kept) // 3, 0), **{CACHE: first[CACHE]})
        torch.testing.assert_close(kept_with(first[CACHE]).mixture.weights, kept.flip(0))


def test_beams_by_hand_and_a_generation_goes_on() -> None:
    """What generate returns with beams is passed on, its rows being the best beams of both prompts."""
    pool = pool_of("Llama")
    weights = pool.attention_weights(PROMPTS)
    found = pool.generate(PROMPTS, num_beams=3, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = found[CACHE]
    rows = len(cache.layers[0].keys)
    got = pool(NEXT.repeat_interleave(rows // 3, 0), **{CACHE: copy.deepcopy(cache)}).logits
    expected = pool(
        NEXT.repeat_interleave(rows // 3, 0),
        **{CACHE: cache},
        sapt_weights=weights.repeat_interleave(rows // 3, 0),
    ).logits
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


# --- a start that many prompts share ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "generate", "cut back"])
def test_a_copied_cache_that_goes_on_with_a_prompt_is_told_once(how: str) -> None:
    pool = pool_of("Llama")
    system, rest = PROMPTS[:1, :5], PROMPTS[:1, 5:]
    kept = pool(system, use_cache=True)[CACHE]

    def request() -> None:
        if how == "cut back":
            kept.crop(5 - kept.get_seq_length())
            pool(rest, **{CACHE: kept})
        elif how == "forward":
            pool(rest, **{CACHE: copy.deepcopy(kept)})
        else:
            pool.generate(PROMPTS[:1], **{CACHE: copy.deepcopy(kept)}, max_new_tokens=1)

    if how == "cut back":
        pool(rest, **{CACHE: kept})
    with pytest.warns(UserWarning, match=r"system prompt.*sapt_weights=model\.attention_weights"):
        request()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        request()


def test_a_chat_and_a_decode_loop_are_not_told() -> None:
    pool = pool_of("Llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = pool(PROMPTS, use_cache=True)[CACHE]
        cache = pool(NEXT, **{CACHE: copy.deepcopy(cache)})[CACHE]  # one token: an answer goes on
        pool(PROMPTS, **{CACHE: cache})  # the next turn


def test_weights_given_with_a_copied_cache_hold() -> None:
    pool = pool_of("Llama")
    kept = pool(PROMPTS[:1, :5], use_cache=True)[CACHE]
    weights = pool.attention_weights(PROMPTS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = pool(PROMPTS[:1, 5:], **{CACHE: copy.deepcopy(kept)}, sapt_weights=weights)
    torch.testing.assert_close(kept_with(got[CACHE]).mixture.weights, weights)


@pytest.mark.parametrize("more", [{"output_hidden_states": True}, {"output_attentions": True}, {}])
def test_encoder_outputs_with_all_that_can_be_in_them(more: dict[str, bool]) -> None:
    pool = build_pool("t5", TASKS).eval()
    batch, start = padded(token_rows([9, 9, 9], seed=3)), torch.tensor([[PAD, 5]] * 3)
    weights, order = pool.attention_weights(**batch), [2, 0, 1]
    encoded = pool.get_base_model().get_encoder()(**batch, **more)
    encoded.last_hidden_state = encoded.last_hidden_state[order]
    expected = pool(encoder_outputs=encoded, decoder_input_ids=start, sapt_weights=weights[order]).logits
    torch.testing.assert_close(pool(encoder_outputs=encoded, decoder_input_ids=start).logits, expected)


def test_a_system_prompt_that_is_repeated_for_several_users_is_told() -> None:
    pool = pool_of("Llama")
    cache = pool(PROMPTS[:1, :5], use_cache=True)[CACHE]
    cache.batch_repeat_interleave(3)
    with pytest.warns(UserWarning, match="system prompt"):
        pool(PROMPTS[:, 5:], **{CACHE: cache})


def test_assistants_chats_and_samples_of_one_prompt_are_not_told() -> None:
    pool, assistant = pool_of("Llama"), pool_of("Llama", tasks=["x", "y"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*system prompt.*")
        pool.generate(PROMPTS[:1], assistant_model=assistant, max_new_tokens=8, do_sample=False)
        found = pool.generate(PROMPTS, max_new_tokens=3, return_dict_in_generate=True)
        found[CACHE].crop(-1)
        pool(torch.cat([NEXT, NEXT, NEXT, NEXT], 1), **{CACHE: found[CACHE]})  # the next turn
        prefix = pool(PROMPTS[:, :-1], use_cache=True)[CACHE]
        for _ in range(2):
            pool.generate(PROMPTS, **{CACHE: copy.deepcopy(prefix)}, max_new_tokens=2)


def test_a_cache_of_other_tasks_is_refused() -> None:
    """As many as before, but not the same."""
    pool = pool_of("Llama")
    cache = pool(PROMPTS, use_cache=True)[CACHE]
    pool.remove_task("a")
    pool.commit_task([{"input_ids": PROMPTS}])
    pool.add_task("d")
    with pytest.raises(WeightsError, match="carries no attention weights of the active pool"):
        pool.eval()(NEXT, **{CACHE: cache})


# --- other forms of the same -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["lora", "prompt"])
def test_encoder_outputs_as_a_tuple(block: str) -> None:
    pool = build_pool("t5", TASKS, block=block).eval()
    batch, start = padded(token_rows([9, 9, 9], seed=3)), torch.tensor([[PAD, 5]] * 3)
    encoder = pool.get_base_model().get_encoder()
    expected = pool(**batch, decoder_input_ids=start).logits
    mask = batch["attention_mask"]
    for dictionary in (True, False):
        encoded = encoder(**batch, return_dict=dictionary)
        got = pool(encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=start).logits
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(WeightsError, match="encoder_outputs was given, but it carries no attention weights"):
        pool(encoder_outputs=(encoded[0].clone(),), attention_mask=mask, decoder_input_ids=start)


@pytest.mark.parametrize("family", ["Llama", "Mamba", "RWKV"])
def test_a_cache_out_of_a_tuple(family: str) -> None:
    pool = pool_of(family)
    name, cache = filled(pool)
    expected = pool(NEXT, **{name: cache}, use_cache=True).logits
    found = pool(PROMPTS, use_cache=True, return_dict=False)[1]
    assert torch.equal(pool(NEXT, **{name: found}, use_cache=True).logits, expected)


def test_a_cache_that_was_pickled() -> None:
    pool = pool_of("Llama")
    cache = filled(pool)[1]
    pool(NEXT, **{CACHE: cache})  # written to since
    expected = pool(NEXT, **{CACHE: copy.deepcopy(cache)}).logits
    found = pickle.loads(pickle.dumps(cache))
    assert torch.equal(pool(NEXT, **{CACHE: copy.deepcopy(found)}).logits, expected)
    found.layers[-1].keys[:] = found.layers[-1].keys[[2, 0, 1]]
    with pytest.raises(WeightsError, match="changed in place"):
        pool(NEXT, **{CACHE: found})
