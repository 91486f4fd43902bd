"""A row's result depends on that row alone: not on batch mates, padding, beams or the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from helpers.tiny import CACHE, assert_real_pool, build_pool, padded, token_rows, watch_weights

ROWS = token_rows([5, 9, 1, 14, 7, 3, 11, 6])


def run(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a batch; an encoder-decoder gets the same four decoder tokens in every row."""
    extra = {}
    if model.config.is_encoder_decoder:
        extra["decoder_input_ids"] = torch.tensor([[1, 20, 30, 40]]).repeat(len(batch["input_ids"]), 1)
    with torch.no_grad():
        return model(**batch, **extra).logits


def at_real_positions(model, logits: torch.Tensor, mask: torch.Tensor, row: int) -> torch.Tensor:
    return logits[row] if model.config.is_encoder_decoder else logits[row][mask[row].bool()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 1, 37])
def test_batch_mates_and_padding(pool, side: str, extra: int) -> None:
    batch = padded(ROWS, side, extra)
    weights, logits = pool.attention_weights(**batch), run(pool, batch)
    assert_real_pool(weights)
    for i, row in enumerate(ROWS):
        alone = padded([row])
        torch.testing.assert_close(weights[i : i + 1], pool.attention_weights(**alone), atol=1e-6, rtol=0)
        mine, its = at_real_positions(pool, logits, batch["attention_mask"], i), run(pool, alone)[0]
        torch.testing.assert_close(mine, its, atol=1e-4, rtol=0)


def test_padding_is_recognised_without_a_mask(pool) -> None:
    batch = padded(ROWS)
    without = pool.attention_weights(batch["input_ids"])
    torch.testing.assert_close(without, pool.attention_weights(**batch), atol=1e-6, rtol=0)


def test_labels_never_enter_the_query() -> None:
    model = build_pool("llama", ["a", "b", "c"])
    ids = torch.tensor(token_rows([12, 12, 12]))
    labels = ids.clone()
    labels[:, :8] = -100
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 17) % 90 + 5
    prompt = model.attention_weights(ids[:, :8])
    assert_real_pool(prompt)
    torch.testing.assert_close(model.attention_weights(ids, labels=labels), prompt, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.attention_weights(other, labels=labels), prompt, atol=1e-6, rtol=0)
    model.train()
    captured = weights_used(model, lambda: model(input_ids=ids, labels=labels))
    torch.testing.assert_close(captured, prompt, atol=1e-6, rtol=0)


def test_a_query_mask_of_the_caller_counts(pool) -> None:
    ids = torch.tensor(token_rows([8, 8, 8, 8]))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2:5] = True
    expected = pool.attention_weights(ids[:, 2:5])
    assert_real_pool(expected)
    torch.testing.assert_close(pool.attention_weights(ids, sapt_prompt_mask=mask), expected, atol=1e-6, rtol=0)
    extra = {"decoder_input_ids": ids[:, :3]} if pool.config.is_encoder_decoder else {}
    with torch.no_grad():
        masked = pool(input_ids=ids, sapt_prompt_mask=mask, **extra).logits
        torch.testing.assert_close(masked, pool(input_ids=ids, sapt_weights=expected, **extra).logits)
        assert not torch.allclose(masked, pool(input_ids=ids, **extra).logits, atol=1e-4)


def weights_used(model, call) -> torch.Tensor:
    """The weights that reach the layers during ``call``."""
    seen = []
    layer = next(m for m in model.modules() if hasattr(m, "sapt_A"))
    (handle,) = watch_weights([layer], seen)
    call()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_holds_the_weights_of_the_prompt(pool, beams: int) -> None:
    batch = padded(ROWS)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    expected = pool.attention_weights(**batch)
    assert_real_pool(expected)
    seen = []
    layers = [m for m in pool.modules() if hasattr(m, "sapt_A")]
    handles = watch_weights(layers, seen)
    cached = pool.generate(**batch, **settings)
    for handle in handles:
        handle.remove()
    for weights in seen:
        spread = expected.repeat_interleave(weights.shape[0] // len(ROWS), dim=0)
        torch.testing.assert_close(weights, spread, atol=1e-6, rtol=0)
    assert torch.equal(cached, pool.generate(**batch, **settings, use_cache=False))


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_of_a_row_alone(pool, beams: int) -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    together = pool.generate(**padded(ROWS), **settings)[:, -6:]
    for i, row in enumerate(ROWS):
        assert torch.equal(pool.generate(**padded([row]), **settings)[0, -6:], together[i])


def test_several_return_sequences(pool) -> None:
    batch = padded(ROWS[:3])
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 4, "do_sample": False}
    best = pool.generate(**batch, **settings)
    three = pool.generate(**batch, **settings, num_return_sequences=3)
    assert torch.equal(three[::3], best)


def test_static_cache_decodes_the_same(pool) -> None:
    if pool.config.is_encoder_decoder:
        cache = {"cache_implementation": "static"}
    else:
        cache = {CACHE: StaticCache(config=pool.config, max_cache_len=32)}
    batch, settings = padded(ROWS[:3]), {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(pool.generate(**batch, **settings, **cache), pool.generate(**batch, **settings))


def test_manual_decoding_keeps_the_weights_with_the_cache() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    ids = torch.tensor(token_rows([6, 6]))
    expected = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        out, tokens = model(input_ids=ids, use_cache=True), ids
        for _ in range(4):
            step = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], dim=1)
            out = model(input_ids=step, **{CACHE: out[CACHE]}, use_cache=True)
    assert torch.equal(tokens, expected)


def test_a_chat_turn_keeps_the_mixture_of_its_cache() -> None:
    model = build_pool("llama", ["a", "b", "c"]).eval()
    first = torch.tensor(token_rows([7, 7]))
    held = model.attention_weights(first)
    assert_real_pool(model.attention_weights(torch.tensor(token_rows([7] * 6))))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    turn = model.generate(input_ids=first, return_dict_in_generate=True, **settings)
    longer = torch.cat([turn.sequences, torch.tensor(token_rows([5, 5], seed=3))], dim=1)
    second = model.generate(input_ids=longer, **{CACHE: turn[CACHE]}, **settings)
    assert torch.equal(second, model.generate(input_ids=longer, sapt_weights=held, **settings))


def test_encoder_outputs_carry_their_weights() -> None:
    model = build_pool("t5", ["a", "b", "c"]).eval()
    batch, ids = padded(ROWS[:4]), torch.tensor([[1, 9, 8]] * 4)
    with torch.no_grad():
        encoded = model.get_encoder()(**batch)
        split = model(encoder_outputs=encoded, attention_mask=batch["attention_mask"], decoder_input_ids=ids).logits
        torch.testing.assert_close(split, model(**batch, decoder_input_ids=ids).logits)
    generated = model.generate(encoder_outputs=encoded, attention_mask=batch["attention_mask"], max_new_tokens=4)
    assert torch.equal(generated, model.generate(**batch, max_new_tokens=4))


def test_fixed_weights_and_task_names(pool) -> None:
    batch = padded(ROWS[:3])
    extra = {"decoder_input_ids": batch["input_ids"][:, -1:]} if pool.config.is_encoder_decoder else {}
    one_hot = torch.tensor([[0.0, 1.0, 0.0]]).repeat(3, 1)
    with torch.no_grad():
        named = pool(**batch, sapt_task="b", **extra).logits
        assert torch.equal(named, pool(**batch, sapt_weights=one_hot, **extra).logits)
        per_row = pool(**batch, sapt_task=["a", "b", "c"], **extra).logits
        torch.testing.assert_close(per_row[1], named[1])
        torch.testing.assert_close(pool(**batch, sapt_task="a", **extra).logits[0], per_row[0])
    for beams in (1, 3):
        settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False}
        assert torch.equal(
            pool.generate(**batch, sapt_task="b", **settings), pool.generate(**batch, sapt_weights=one_hot, **settings)
        )


def test_a_row_of_padding_gets_uniform_weights_in_inference(pool) -> None:
    batch = padded([ROWS[0], ROWS[1]])
    batch["attention_mask"][0] = 0
    weights = pool.attention_weights(**batch)
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights[1:], pool.attention_weights(**padded([ROWS[1]])), atol=1e-6, rtol=0)
