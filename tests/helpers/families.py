"""Tiny models of each kind of cache and state, and pools on them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from helpers.tiny import PAD, VOCAB
from peft_sapt import SaptConfig

TASKS = ["a", "b", "c"]
IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": 2}
SMALL = {**IDS, "hidden_size": 32, "num_hidden_layers": 2}
SHAPE = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
MAMBA_2 = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4}

FAMILIES: dict[str, tuple[type, type, dict[str, Any], list[str]]] = {
    "Llama": (tf.LlamaConfig, tf.LlamaForCausalLM, SHAPE, ["q_proj", "v_proj"]),
    "Mistral, sliding": (tf.MistralConfig, tf.MistralForCausalLM, {**SHAPE, "sliding_window": 4}, ["q_proj"]),
    "Gemma 2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, {**SHAPE, "sliding_window": 4}, ["q_proj", "o_proj"]),
    "Mamba": (tf.MambaConfig, tf.MambaForCausalLM, {**SMALL, "state_size": 8}, ["in_proj", "x_proj"]),
    "Mamba 2": (tf.Mamba2Config, tf.Mamba2ForCausalLM,
                {**SMALL, **MAMBA_2}, ["in_proj"]),
    "Falcon H1": (tf.FalconH1Config, tf.FalconH1ForCausalLM, {**SHAPE, **MAMBA, "mamba_d_ssm": 64},
                  ["in_proj", "q_proj"]),
    "LFM 2": (tf.Lfm2Config, tf.Lfm2ForCausalLM, {**SHAPE, "layer_types": ["conv", "full_attention"]},
              ["in_proj", "q_proj"]),
    "RWKV": (tf.RwkvConfig, tf.RwkvForCausalLM, SMALL, ["key", "value"]),
}  # fmt: skip


def pool_of(family: str, **settings: Any) -> PeftModel:
    config, model, shape, targets = FAMILIES[family]
    torch.manual_seed(0)
    base = model(config(**shape)).eval()
    base.get_input_embeddings().weight.data.normal_()
    adapted = {} if settings.get("block") == "prompt" else {"target_modules": targets}
    settings = {"tasks": TASKS, "init_weights": False, "temperature": 0.3, **adapted, **settings}
    pool = get_peft_model(base, SaptConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            if "query_down" in name:
                parameter.mul_(4)
    return pool
