"""A file fits its pool exactly: every tensor has a place, every place a tensor, and routes as it was saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from helpers.tiny import VOCAB
from peft_sapt import SaptConfig, accept
from peft_sapt.errors import PoolFormatError

TASKS = ["a", "b", "c"]
SETTINGS: dict[str, Any] = {"tasks": TASKS, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}


def base(kind: type = LlamaForCausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=2, pad_token_id=1, **shape))
    return model.model if kind is LlamaModel else model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    get_peft_model(base(), SaptConfig(**SETTINGS)).save_pretrained(path)
    return path


def test_another_class_of_model_is_refused(folder, tmp_path) -> None:
    with pytest.raises(PoolFormatError, match=r"does not fit the pool.*no place in this .*AutoModelForCausalLM"):
        PeftModel.from_pretrained(base(LlamaModel), folder)
    inner = get_peft_model(base(LlamaModel), SaptConfig(**SETTINGS))
    inner.save_pretrained(tmp_path)
    with pytest.raises(PoolFormatError, match="does not fit the pool"):
        PeftModel.from_pretrained(base(), tmp_path)
    with accept("unknown_tensors"), accept("missing_tensors"):
        PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("other", [{"target_modules": ["k_proj", "o_proj"]}, {"target_modules": ["q_proj"]},
                                   {"target_modules": ["q_proj", "v_proj", "o_proj"]}, {"layers_to_transform": [1]},
                                   {"exclude_modules": ["v_proj"]}, {"router": "ridge"}, {"query_dim": 7},
                                   {"query_activation": "between"}, {"temperature": 0.3}, {"pool_padding": True},
                                   {"block": "prompt", "target_modules": None, "task_type": "CAUSAL_LM"}])  # fmt: skip
@pytest.mark.parametrize("way", ["load_adapter", "config"])
def test_a_pool_of_another_kind_is_refused(other: dict[str, Any], way: str, folder) -> None:
    config = SaptConfig(**{**SETTINGS, **other})
    with pytest.raises(PoolFormatError, match=r"fit the pool|were saved with"):
        if way == "config":
            PeftModel.from_pretrained(base(), folder, config=config)
        else:
            get_peft_model(base(), config).load_adapter(folder, "default")


def test_the_same_kind_fits(folder) -> None:
    model, ids = get_peft_model(base(), SaptConfig(**SETTINGS)), torch.tensor([[5, 6, 7, 8]])
    model.load_adapter(folder, "default")
    loaded = PeftModel.from_pretrained(base(), folder, config=SaptConfig(**SETTINGS))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base(), folder).eval()(ids).logits
        for found in (model, loaded):
            torch.testing.assert_close(found.eval()(ids).logits, expected)
