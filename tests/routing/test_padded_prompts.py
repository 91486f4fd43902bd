"""A row's result is that of the row alone, whatever pads it, in `generate` too, which may drop a mask of all ones."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from helpers.families import FAMILIES, pool_of
from helpers.tiny import PAD, build_pool, padded, token_rows
from helpers.upstream import peft_loses_its_own_prompt
from peft_sapt import SaptConfig

ROWS = token_rows([4, 9, 6], seed=3)
SOFT = {"block": "prompt", "num_virtual_tokens": 3}
ALONE = [name for name in FAMILIES if name != "RWKV"]  # whose states padding reaches without any adapter


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALONE)
def test_soft_prompts_stand_right_before_a_rows_tokens(family: str, side: str) -> None:
    """Logits of a padded batch against those of each row alone: windows and states run over nothing in between."""
    pool = pool_of(family, **SOFT)
    width = max(map(len, ROWS))
    ids, mask = torch.full((len(ROWS), width), PAD), torch.zeros(len(ROWS), width, dtype=torch.long)
    for i, row in enumerate(ROWS):
        places = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    together = pool(input_ids=ids, attention_mask=mask).logits
    assert together.shape[1] == width
    for i, row in enumerate(ROWS):
        alone = pool(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)).logits[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALONE)
def test_soft_prompts_generate_as_each_row_alone(family: str) -> None:
    """Logits of each step of a padded batch, of the row alone, and of a whole forward without a cache."""
    pool, batch = pool_of(family, **SOFT), padded(ROWS)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    together = pool.generate(**batch, **how)
    for i, row in enumerate(ROWS):
        alone = pool.generate(**padded([row]), **how)
        assert torch.equal(together.sequences[i, -4:], alone.sequences[0, -4:])
        weights = pool.attention_weights(**padded([row]))
        whole = pool(alone.sequences, sapt_weights=weights, use_cache=False).logits[0, len(row) - 1 : -1]
        for step in range(4):
            torch.testing.assert_close(together.logits[step][i], alone.logits[step][0], atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(alone.logits[step][0], whole[step], atol=2e-4, rtol=1e-4)


WAYS = [(block, how) for block in ("lora", "prompt") for how in ({}, {"use_cache": False})]


@pytest.mark.parametrize("by", ["the pool", "the base model"])
@pytest.mark.parametrize(("block", "how"), [*WAYS, ("lora", {"cache_implementation": "static"})], ids=str)
def test_an_attended_pad_token_is_text(block: str, how: dict, by: str) -> None:
    """Marked as such by a mask of all ones, which newer transformers drop on the way to the model."""
    pool = build_pool("llama", ["a", "b", "c"], **(SOFT if block == "prompt" else {})).eval()
    rows = torch.tensor([[9, PAD, 7, PAD, 8, 30, 40], [5, 6, 7, 8, 9, PAD, PAD]])
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    expected = pool(**given).logits[:, -1]
    model = pool if by == "the pool" else pool.get_base_model()
    found = model.generate(**given, **how, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(found.logits[0], expected, atol=1e-5, rtol=1e-5)
    unmarked = pool(rows).logits[:, -1]  # without a mask the pad token is padding, as for generate
    assert float((unmarked - expected).abs().max()) > 1e-4


def test_models_without_positions_keep_attended_pads_too() -> None:
    pool = pool_of("Mamba", **SOFT)
    rows = torch.tensor([[9, PAD, 7, PAD, 8]])
    given = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    found = pool.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(found.logits[0], pool(**given).logits[:, -1], atol=1e-4, rtol=1e-4)


def tiny_gpt2(**settings):
    torch.manual_seed(0)
    base = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, pad_token_id=PAD)).eval()
    settings = {"tasks": ["a", "b"], "init_weights": False, **SOFT, **settings}
    return get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", **settings)).eval()


def test_positions_that_are_given_go_with_their_tokens() -> None:
    """Given ones, counted from each row's first token, are the same as none."""
    pool, batch = tiny_gpt2(), padded(ROWS)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    attended = batch["attention_mask"].bool()
    expected = pool(**batch).logits[attended]
    torch.testing.assert_close(pool(**batch, position_ids=positions).logits[attended], expected)
    one = {name: value[1:2] for name, value in batch.items()}  # unpadded: positions of one row serve all
    shared = pool(**one, position_ids=torch.arange(one["input_ids"].shape[1]).unsqueeze(0)).logits
    torch.testing.assert_close(shared, pool(**one).logits)


def test_positions_that_count_the_padding_move_virtual_tokens_too() -> None:
    """Where only distances count, a row is what it is alone."""
    pool, batch = build_pool("llama", ["a", "b", "c"], **SOFT).eval(), padded(ROWS)
    attended, every = batch["attention_mask"].bool(), torch.arange(batch["input_ids"].shape[1]).unsqueeze(0)
    found = pool(**batch, position_ids=every).logits[attended]
    torch.testing.assert_close(found, pool(**batch).logits[attended], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", ["lora", "prompt"])
@pytest.mark.parametrize("family", ["Llama", "Mamba"])
def test_a_forward_for_the_last_logits_without_a_mask_still_finds_padding(family: str, block: str) -> None:
    """It looks almost like one of `generate`, which has dropped its mask, but is none."""
    pool = pool_of(family, **(SOFT if block == "prompt" else {}))
    ids = padded(ROWS)["input_ids"]
    expected = pool(ids).logits[:, -1]
    for more in ({"return_dict": True}, {"return_dict": True, "position_ids": None}, {"use_cache": True}):
        found = pool(input_ids=ids, logits_to_keep=1, **more).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_logits_of_some_tokens() -> None:
    """By negative number, by a mask of positions, and more of them than the caller's."""
    pool, rows = build_pool("llama", ["a", "b", "c"], **SOFT).eval(), torch.tensor(token_rows([8, 8]))
    whole = pool(rows).logits
    picked = torch.tensor([False, True, False, False, True, False, False, True])
    for kept, expected in (
        (torch.tensor([-1, -3]), whole[:, [-1, -3]]),
        (picked, whole[:, picked]),
        (torch.tensor([0, 7]), whole[:, [0, 7]]),
        (9, whole),
        (11, whole),
        (2, whole[:, -2:]),
    ):
        torch.testing.assert_close(pool(rows, logits_to_keep=kept).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoder_is_masked_in_a_generation_without_a_mask(side: str) -> None:
    """Where `generate` makes none: the encoder's states of a padded row are those of the row alone."""
    pool, batch = build_pool("t5", ["a", "b", "c"], **SOFT).eval(), padded(ROWS, side)
    how = {"max_new_tokens": 1, "output_hidden_states": True, "return_dict_in_generate": True}
    states = pool.generate(input_ids=batch["input_ids"], **how).encoder_hidden_states[-1]
    for i, row in enumerate(ROWS):
        alone = pool.generate(input_ids=torch.tensor([row]), **how).encoder_hidden_states[-1][0]
        found = states[i, -len(alone) :] if side == "left" else states[i, : len(alone)]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [False, True])
def test_an_exported_soft_prompt_generates_the_same_in_peft(use_cache: bool, tmp_path) -> None:
    if use_cache and peft_loses_its_own_prompt():
        pytest.xfail("PEFT's prompt tuning generates other tokens on a cache than without, with this transformers")
    pool, batch = build_pool("llama", ["a", "b", "c"], **SOFT).eval(), padded([ROWS[1], ROWS[1][::-1]])
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = pool.generate(**batch, sapt_task="b", **how)
    pool.export_task("b", tmp_path)
    plain = PeftModel.from_pretrained(pool.unload(), tmp_path).eval()
    assert torch.equal(plain.generate(**batch, use_cache=use_cache, **how), expected)
