"""Seeded tiny models and pools of random blocks for the tests; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from peft_sapt import SaptConfig
from peft_sapt.compat import cache_argument

CACHE = cache_argument(LlamaForCausalLM)  # the name of a cache in the installed transformers
VOCAB = 100
PAD = 1


def tiny_llama(hidden: int = 64, kv_heads: int = 2) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        pad_token_id=PAD,
        bos_token_id=3,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tiny_t5(hidden: int = 64, inner: int = 48, decoder_layers: int = 2) -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=hidden,
        d_kv=inner // 4,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=decoder_layers,
        num_heads=4,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
        eos_token_id=2,
        dropout_rate=0.0,
    )
    return T5ForConditionalGeneration(config)


FAMILIES: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("CAUSAL_LM", tiny_llama),
    "t5": ("SEQ_2_SEQ_LM", tiny_t5),
}


def build_pool(family: str, tasks: list[str], seed: int = 0, **config) -> PeftModel:
    """A pool of random, non-zero blocks of mixed ranks, whose weights differ clearly from row to row."""
    task_type, make = FAMILIES[family]
    torch.manual_seed(seed)
    ranks = [2 + i % 3 for i in range(len(tasks))]
    settings = {"tasks": tasks, "task_ranks": ranks, "init_weights": False, "temperature": 0.4, **config}
    model = get_peft_model(make(), SaptConfig(task_type=task_type, **settings))
    embedding = model.get_base_model().get_input_embeddings().weight
    with torch.no_grad():
        embedding.normal_(std=1.0)
        if settings.get("router", "attention") == "attention":
            model.base_model.attention.sapt_query_down["default"].weight.mul_(4)
    return model


def token_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=rng).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str = "left", extra: int = 0) -> dict[str, torch.Tensor]:
    """Rows as a batch, padded to the longest plus ``extra``."""
    width = max(map(len, rows)) + extra
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        ids.append([PAD] * fill + row if side == "left" else row + [PAD] * fill)
        mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_real_pool(weights: torch.Tensor) -> None:
    """A test on a pool is void unless every row mixes several blocks, and rows differ."""
    assert weights.shape[1] >= 3
    assert float(weights.max()) < 0.999, weights
    assert float(weights.std(dim=0).max()) > 0.01, weights
    assert float(weights.std(dim=1).min()) > 0.01, weights


def labelled(family: str, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A training batch: answers behind two prompt tokens, or for an encoder-decoder the first three tokens."""
    batch = padded(rows, "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if family == "t5":
        return {**batch, "labels": labels[:, :3].contiguous()}
    labels[:, :2] = -100
    return {**batch, "labels": labels}


def commit(model, seed: int = 0) -> None:
    """Commit the current task of a pool that was not trained, with some prompts of its own."""
    model.commit_task(inputs=[padded(token_rows([4, 5, 6, 7], seed=seed))])


def grow(model, name: str, **block) -> None:
    """Add a task to a pool whose current one was not trained, and so may have to be committed first."""
    if model.current_task not in model.committed_tasks:
        commit(model)
    model.add_task(name, **block)


def watch_weights(layers, seen: list) -> list:
    """Note in ``seen`` by which weights ``layers`` mix, in each forward with blocks; handles to end it."""

    def note(layer, args) -> None:
        if not layer.forward_state.blocks_are_off:
            seen.append(layer.forward_state.weights.detach().clone())

    return [layer.register_forward_pre_hook(note) for layer in layers]
