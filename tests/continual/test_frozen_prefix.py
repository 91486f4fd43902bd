"""Remembering the frozen lower layers changes nothing but the time."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.tiny import padded, tiny_llama, tiny_t5, token_rows
from peft_sapt import SaptConfig
from peft_sapt.continual.frozen_prefix import FrozenPrefix, with_frozen_prefix

DEPTH, LAYERS = 3, 5
ROWS = token_rows([5, 9, 3, 7])


def deep_llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 100, "pad_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, **sizes, **tokens, **config)).eval()


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    return deep_llama()


def remembering(base: LlamaForCausalLM) -> LlamaForCausalLM:
    model = with_frozen_prefix(base, DEPTH)
    assert model is not None
    return model


def prefix_of(model: torch.nn.Module) -> FrozenPrefix:
    return next(m for m in model.modules() if isinstance(m, FrozenPrefix))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_the_bases(base, side) -> None:
    model, batch = remembering(base), padded(ROWS, side)
    keep = batch["attention_mask"].bool()
    for _ in range(2):  # the second time from memory
        found = model(**batch).logits[keep]
        torch.testing.assert_close(found, base(**batch).logits[keep], rtol=1e-4, atol=1e-5)
    assert len(prefix_of(model).rows) == len(ROWS)


def test_memory_depends_on_the_row_alone(base) -> None:
    one, other = remembering(base), remembering(base)
    one(**padded(ROWS, "left", extra=3))
    for row in reversed(ROWS):
        other(**padded([row]))
    first, second = prefix_of(one).rows, prefix_of(other).rows
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].hidden, second[key].hidden) for key in first)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_the_bases(base, beams) -> None:
    model, batch = remembering(base), padded(ROWS)
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 1}
    expected = base.generate(**batch, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(**batch, **settings), expected)
    assert all(known.cached is not None for known in prefix_of(model).rows.values())


def test_gradients_are_the_bases(base) -> None:
    batch = padded(ROWS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for model in (copy.deepcopy(base), remembering(base)):
        torch.manual_seed(1)
        tuned = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", layers_to_transform=[3, 4], init_lora_weights=False)
        )
        tuned.train()
        tuned(**batch, labels=labels).loss.backward()
        gradients.append({n: p.grad for n, p in tuned.named_parameters() if p.grad is not None})
    plain, remembered = gradients
    assert plain.keys() == remembered.keys() and len(plain) == 8
    for name, gradient in plain.items():
        torch.testing.assert_close(remembered[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_pool_routes_as_ever(base) -> None:
    weights = []
    for model in (copy.deepcopy(base), remembering(base)):
        torch.manual_seed(1)
        config = SaptConfig(
            task_type="CAUSAL_LM", tasks=["a", "b", "c"], layers_to_transform=[3, 4], init_weights=False
        )
        pool = get_peft_model(model, config).eval()
        weights.append((pool.attention_weights(**padded(ROWS)), pool(**padded(ROWS)).logits[:, -1]))
    assert torch.equal(weights[0][0], weights[1][0])
    torch.testing.assert_close(weights[0][1], weights[1][1], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_told_runs_through_the_layers(base) -> None:
    model, batch = remembering(base), padded(ROWS)
    embeds = base.get_input_embeddings()(batch["input_ids"])
    keep = batch["attention_mask"].bool()
    for inputs in (
        {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]},
        {**batch, "use_cache": True},  # positions count from the padding
        {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)},
    ):
        known = len(prefix_of(model).rows)
        mask = inputs["attention_mask"].bool() if "input_ids" in inputs else keep
        found, expected = model(**inputs).logits[mask], base(**inputs).logits[mask]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if "attention_mask" in inputs and inputs.get("use_cache"):
            assert len(prefix_of(model).rows) == known


def test_nothing_can_adapt_or_train_the_prefix(base) -> None:
    model = remembering(base)
    assert not any(name.startswith("model.layers.0.") for name, _ in model.named_parameters())
    copied = copy.deepcopy(model)
    assert prefix_of(copied) is prefix_of(model)
    prefix = prefix_of(model)
    model(**padded(ROWS))
    model.to("cpu")
    assert len(prefix.rows) == len(ROWS)
    model.double()
    assert not prefix.rows and next(prefix._below[0][0].parameters()).dtype == torch.float64


def test_other_families_are_left_alone() -> None:
    assert with_frozen_prefix(tiny_t5(), 1) is None
    assert with_frozen_prefix(tiny_llama(), 0) is None
    assert with_frozen_prefix(deep_llama(attention_dropout=0.1), 2) is None


def test_memory_is_bounded_and_the_oldest_rows_go_first(base, monkeypatch) -> None:
    model, batch = remembering(base), padded(ROWS)
    model(**batch)
    prefix = prefix_of(model)
    sizes = {key: known.bytes for key, known in prefix.rows.items()}
    assert prefix.bytes == sum(sizes.values()) == sum(4 * 32 * len(row) for row in ROWS)
    monkeypatch.setattr("peft_sapt.continual.frozen_prefix.CACHE_BYTES", prefix.bytes)
    other = token_rows([4], seed=1)
    keep = padded(other)["attention_mask"].bool()
    torch.testing.assert_close(model(**padded(other)).logits[keep], base(**padded(other)).logits[keep])
    assert next(iter(prefix.rows)) == tuple(ROWS[1])
    assert prefix.bytes == sum(known.bytes for known in prefix.rows.values())
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    monkeypatch.setattr("peft_sapt.continual.frozen_prefix.CACHE_BYTES", 1)
    assert torch.equal(model.generate(**batch, **settings), base.generate(**batch, **settings)), "one row at a time"
    assert len(prefix.rows) == 1
