"""A base with something merged into it is another base, wherever it was merged: names and depths of real families."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_sapt.storage.fingerprint import LAYERS, VALUES, differing, fingerprint

SMALL = {"vocab_size": 24, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 1}
GPT2 = {"vocab_size": 24, "n_embd": 8, "n_head": 2, "n_positions": 16}
T5 = {"vocab_size": 24, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2, "decoder_start_token_id": 1}
BART = {"vocab_size": 24, "d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
FAMILIES = {  # with as many layers as a model of the family has
    "gemma-2b": (tf.GemmaConfig, tf.GemmaForCausalLM, {**GROUPED, "num_hidden_layers": 18}),
    "gemma-3-1b": (tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, {**GROUPED, "num_hidden_layers": 26}),
    "Qwen2.5-7B": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {**GROUPED, "num_hidden_layers": 28}),
    "SmolLM2-135M": (tf.LlamaConfig, tf.LlamaForCausalLM, {**GROUPED, "num_hidden_layers": 30}),
    "Mistral-7B": (tf.MistralConfig, tf.MistralForCausalLM, {**GROUPED, "num_hidden_layers": 32}),
    "Phi-3-mini": (tf.Phi3Config, tf.Phi3ForCausalLM, {**GROUPED, "num_hidden_layers": 32}),
    "Qwen3-8B": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {**GROUPED, "num_hidden_layers": 36}),
    "Llama-70B": (tf.LlamaConfig, tf.LlamaForCausalLM, {**GROUPED, "num_hidden_layers": 80}),
    "gpt2-medium": (tf.GPT2Config, tf.GPT2LMHeadModel, {**GPT2, "n_layer": 24}),
    "pythia-6.9b": (tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {**SMALL, "num_hidden_layers": 32}),
    "t5-large": (tf.T5Config, tf.T5ForConditionalGeneration, {**T5, "num_layers": 24, "num_decoder_layers": 24}),
    "bart-large": (tf.BartConfig, tf.BartForConditionalGeneration,
                   {**BART, "encoder_layers": 12, "decoder_layers": 12}),
}  # fmt: skip


def base_of(family: str) -> nn.Module:
    config, model, settings = FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**settings)).eval()


def kinds(base: nn.Module) -> dict[str, list[str]]:
    """Matrices by what they are, each with its names in all layers."""
    found: dict[str, list[str]] = {}
    for name, parameter in base.named_parameters():
        if parameter.dim() == 2:
            found.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_weight_alone_shows(family: str) -> None:
    """In every layer, in one layer, in the upper half: embeddings, head, attention and feed-forward alike."""
    base = base_of(family)
    known, parameters = fingerprint(base), dict(base.named_parameters())
    assert differing(known, base) is None
    for kind, names in kinds(base).items():
        for part in (names, names[1:2] or names, names[len(names) // 2 :]):
            before = {name: parameters[name].detach().clone() for name in part}
            with torch.no_grad():
                for name in part:
                    rows, columns = parameters[name].shape
                    parameters[name] += 0.02 * torch.randn(rows, 4) @ torch.randn(4, columns)  # a merged LoRA
            assert differing(known, base) in part, (kind, len(part))
            with torch.no_grad():
                for name in part:
                    parameters[name].copy_(before[name])
    assert differing(known, base) is None


@pytest.mark.parametrize("family", ["gemma-2b", "Llama-70B", "gpt2-medium"])
def test_it_stays_small(family: str) -> None:
    base = base_of(family)
    known = fingerprint(base)
    assert len(json.dumps(known)) < 100_000 and sum(len(e["values"]) for e in known.values()) <= 30 * VALUES * LAYERS


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("family", ["gemma-2b", "Qwen2.5-7B", "Qwen3-8B", "Llama-70B"])
def test_what_peft_merges_is_seen(family: str, targets: list[str]) -> None:
    known = fingerprint(base_of(family))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False)
    other = differing(known, get_peft_model(base_of(family), lora).merge_and_unload())
    assert other is not None and any(target in other for target in targets)
