"""The golden fixtures of the official release as pools.

Their folder is named by PEFT_SAPT_GOLDEN, or found beside the project as ../shared/golden.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from helpers.paths import ROOT
from peft_sapt import SaptConfig

FOLDER = Path(os.environ.get("PEFT_SAPT_GOLDEN") or ROOT.parent / "shared" / "golden")

FILES = sorted(path.stem for path in FOLDER.glob("*_T*.safetensors")) if FOLDER.is_dir() else []

needs_golden = pytest.mark.skipif(
    not FILES, reason=f"no golden fixtures at {FOLDER}: set PEFT_SAPT_GOLDEN to their folder"
)


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as stream:
        return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118


def base_model(kind: str, tensors: dict[str, Tensor]) -> PreTrainedModel:
    if kind.startswith("llama"):
        config = LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=1,
            bos_token_id=1,
            eos_token_id=2,
            rms_norm_eps=1e-6,
        )
        model: PreTrainedModel = LlamaForCausalLM(config)
    else:
        gated = kind.startswith("t5v11")
        config = T5Config(
            vocab_size=100,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
        )
        model = T5ForConditionalGeneration(config)
        if gated:  # transformers 5 ties the head of every T5
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
            model.config.scale_decoder_outputs = False
    state = {name.removeprefix("base."): t for name, t in tensors.items() if name.startswith("base.")}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    left = [n for n in result.missing_keys if "embed_tokens" not in n and "lm_head" not in n]
    assert not left, left
    return model


def golden_pool(stem: str, **config) -> tuple[PeftModel, dict[str, Tensor]]:
    """The pool of a fixture, oldest task first, and the fixture's tensors."""
    kind, count = stem.rsplit("_T", 1)
    base, pool = read(FOLDER / f"{kind}_base.safetensors"), read(FOLDER / f"{stem}.safetensors")
    task_type = "CAUSAL_LM" if kind.startswith("llama") else "SEQ_2_SEQ_LM"
    tasks = [f"task_{i}" for i in range(int(count))]
    settings = SaptConfig(task_type=task_type, r=4, lora_alpha=32, tasks=tasks, features="max", **config)
    model = get_peft_model(base_model(kind, base), settings)
    attention = model.base_model.attention
    with torch.no_grad():
        attention.sapt_query_down["default"].weight.copy_(base["router.trans_input.0.weight"])
        attention.sapt_query_up["default"].weight.copy_(base["router.trans_input.1.weight"])
        attention.sapt_query_norm["default"].weight.copy_(base["router.trans_input.3.weight"])
        attention.sapt_query_norm["default"].bias.copy_(base["router.trans_input.3.bias"])
        fill(attention, "sapt_key", list(pool["router.keys"].flip(0).split(1)))
        for path, layer in lora_layers(model).items():
            fill(layer, "sapt_A", list(pool[f"lora.{path}.A"].flip(0)))
            fill(layer, "sapt_B", [b.T for b in pool[f"lora.{path}.B"].flip(0)])
    return model.train(), pool


def fill(module, name: str, parts: list[Tensor]) -> None:
    module.put_parts(name, "default", parts)


def lora_layers(model: PeftModel) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "sapt_A")}
