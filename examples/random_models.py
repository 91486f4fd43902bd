"""Architectures of known sizes with random weights, for measurements that need no answers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration


def t5(width: int, inner: int, layers: int, heads: int) -> T5Config:
    return T5Config(
        vocab_size=32128, d_model=width, d_kv=width // heads, d_ff=inner, num_layers=layers, num_decoder_layers=layers,
        num_heads=heads, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


SIZES = {  # of T5-small, SmolLM2-135M, Llama-3.2-1B and Llama-2-7B
    "t5-small": t5(512, 2048, 6, 8),
    "llama-135m": llama(576, 1536, 30, 9, 3, 49152),
    "llama-1b": llama(2048, 8192, 16, 32, 8, 128256),
    "llama-7b": llama(4096, 11008, 32, 32, 32, 32000),
}


def random_model(name: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> nn.Module:
    """A model of ``SIZES`` with random weights in ``dtype`` on ``device``."""
    torch.manual_seed(seed)
    config, before = SIZES[name], torch.get_default_dtype()
    make = T5ForConditionalGeneration if isinstance(config, T5Config) else LlamaForCausalLM
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return make(config)
    finally:
        torch.set_default_dtype(before)
