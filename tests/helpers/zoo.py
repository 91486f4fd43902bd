"""Seeded tiny models of every supported family, with pools (or plain LoRA) of random blocks and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers.tiny import PAD, VOCAB, padded, tiny_llama, tiny_t5, token_rows
from peft_sapt import SaptConfig

TASKS = ["a", "b", "c"]
SHAPE = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, **WIDTH, "num_key_value_heads": 2, "head_dim": 8}


def t5_v1_1() -> nn.Module:
    """inner_dim differs from d_model, a head of its own (transformers 5 ties it), a deeper decoder."""
    model = tiny_t5(hidden=32, inner=48, decoder_layers=3)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 32) * 0.1)
    return model


class Mlp(nn.Module):
    """No transformers model: two linear layers on [B, S, D], which take their weights from the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def decoder(config: type, model: type, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: model(config(**{**GROUPED, **settings}))


def encoder(config: type, model: type, labels: int = 3) -> Callable[[], nn.Module]:
    settings = {**SHAPE, **WIDTH, "max_position_embeddings": 64, "num_labels": labels}
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    return lambda: model(config(**settings))


def gpt2() -> nn.Module:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **drop, **SHAPE))


def gptj() -> nn.Module:
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tf.GPTJForCausalLM(
        tf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, n_inner=48, **drop, **SHAPE)
    )


def opt() -> nn.Module:
    width = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    return tf.OPTForCausalLM(
        tf.OPTConfig(num_attention_heads=4, max_position_embeddings=64, dropout=0.0, **width, **SHAPE)
    )


def bart() -> nn.Module:
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    settings = {**SHAPE, **sides, "d_model": 32, "max_position_embeddings": 64, "dropout": 0.0}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(**settings, decoder_start_token_id=2, forced_eos_token_id=None)
    )


@dataclass
class Case:
    """A model and what kind of work it does."""

    task_type: str | None
    make: Callable[[], nn.Module]
    targets: list[str] | None = None

    @property
    def generates(self) -> bool:
        return self.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")


CASES: dict[str, Case] = {
    "Llama": Case("CAUSAL_LM", lambda: tiny_llama(32)),
    "Mistral": Case("CAUSAL_LM", decoder(tf.MistralConfig, tf.MistralForCausalLM)),
    "Qwen2": Case("CAUSAL_LM", decoder(tf.Qwen2Config, tf.Qwen2ForCausalLM)),
    "Qwen3": Case("CAUSAL_LM", decoder(tf.Qwen3Config, tf.Qwen3ForCausalLM)),
    "Gemma": Case("CAUSAL_LM", decoder(tf.GemmaConfig, tf.GemmaForCausalLM)),
    "GPT-2": Case("CAUSAL_LM", gpt2),
    "OPT": Case("CAUSAL_LM", opt),
    "GPT-J": Case("CAUSAL_LM", gptj),
    "T5": Case("SEQ_2_SEQ_LM", lambda: tiny_t5(32)),
    "T5 v1.1": Case("SEQ_2_SEQ_LM", t5_v1_1),
    "BART": Case("SEQ_2_SEQ_LM", bart),
    "BERT, sequence": Case("SEQ_CLS", encoder(tf.BertConfig, tf.BertForSequenceClassification)),
    "BERT, token": Case("TOKEN_CLS", encoder(tf.BertConfig, tf.BertForTokenClassification)),
    "BERT, question": Case("QUESTION_ANS", encoder(tf.BertConfig, tf.BertForQuestionAnswering, 2)),
    "BERT, features": Case("FEATURE_EXTRACTION", encoder(tf.BertConfig, tf.BertModel)),
    "RoBERTa, sequence": Case("SEQ_CLS", encoder(tf.RobertaConfig, tf.RobertaForSequenceClassification)),
    "Llama, sequence": Case("SEQ_CLS", lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**GROUPED, num_labels=3))),
    "nn.Module": Case(None, Mlp, ["first", "second"]),
}  # fmt: skip


def base_of(name: str, seed: int = 0) -> nn.Module:
    """The model of a case without dropout, with embeddings wide enough that prompts differ."""
    torch.manual_seed(seed)
    model = CASES[name].make()
    if hasattr(model, "get_input_embeddings"):
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(std=0.5)
    return model.eval()


def pool_of(name: str, seed: int = 0, **config: Any) -> PeftModel:
    """Three random blocks of mixed ranks under an attention that tells prompts apart."""
    case, base = CASES[name], base_of(name, seed)
    settings = {"tasks": TASKS, "task_ranks": [2, 3, 4], "init_weights": False, "temperature": 0.3}
    settings |= {"target_modules": case.targets, "token_dim": None if case.task_type else 8, **config}
    model = get_peft_model(base, SaptConfig(task_type=case.task_type, **settings))
    with torch.no_grad():
        model.base_model.attention.sapt_query_down["default"].weight.mul_(8)
    return model.eval()


def lora_of(name: str, seed: int = 0, **config: Any) -> PeftModel:
    """Plain LoRA with random weights on the same base: the control."""
    case = CASES[name]
    settings = {"r": 4, "target_modules": case.targets, "init_lora_weights": False, **config}
    return get_peft_model(base_of(name, seed), LoraConfig(task_type=case.task_type, **settings)).eval()


METHODS: dict[str, Callable[..., PeftModel]] = {"sapt": pool_of, "lora": lora_of}
ROWS = token_rows([5, 9, 3, 12])


def batch_of(name: str, rows: list[list[int]] = ROWS, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """Inputs without labels for these rows."""
    case = CASES[name]
    if case.task_type is None:
        return {"x": torch.randn(len(rows), 5, 12, generator=torch.Generator().manual_seed(len(rows)))}
    batch = padded(rows, side, extra)
    if case.task_type == "SEQ_2_SEQ_LM":
        batch["decoder_input_ids"] = torch.tensor([[PAD, 7, 9]] * len(rows))
    return batch


def labelled(name: str, rows: list[list[int]] = ROWS) -> dict[str, torch.Tensor]:
    """A training batch for these rows: answers behind three prompt tokens, or labels of the task's kind."""
    kind, batch = CASES[name].task_type, batch_of(name, rows)
    ids, count = batch.get("input_ids"), len(rows)
    if kind == "CAUSAL_LM":
        labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :2] = -100
        return {**batch, "labels": labels}
    if kind == "SEQ_2_SEQ_LM":
        del batch["decoder_input_ids"]
        return {**batch, "labels": ids[:, :3].contiguous()}
    if kind == "SEQ_CLS":
        return {**batch, "labels": torch.arange(count) % 3}
    if kind == "TOKEN_CLS":
        return {**batch, "labels": (ids % 3).masked_fill(batch["attention_mask"] == 0, -100)}
    if kind == "QUESTION_ANS":
        return {**batch, "start_positions": torch.zeros(count).long(), "end_positions": torch.ones(count).long()}
    return batch


def weights_for(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Explicit weights where a model has no prompt to compute them from."""
    if CASES[name].task_type is not None:
        return {}
    return {"sapt_weights": torch.softmax(torch.randn(rows, 3, generator=torch.Generator().manual_seed(1)), dim=1)}


def result(output: Any) -> torch.Tensor:
    """The tensor of an output that the tests compare."""
    if isinstance(output, torch.Tensor):
        return output
    for name in ("logits", "start_logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(type(output))


def loss_of(name: str, model: nn.Module, **extra: Any) -> torch.Tensor:
    """The model's own loss, or for models without one a fixed projection of what they put out."""
    output = model(**labelled(name), **extra)
    found = getattr(output, "loss", None)
    if found is not None:
        return found
    tensor = result(output)
    return (tensor * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))).mean()


def sapt(model: PeftModel) -> bool:
    return model.peft_config[model.active_adapter].peft_type == "SAPT"


def out(name: str, model: PeftModel, rows=ROWS, side: str = "right", extra: int = 0, **kwargs) -> torch.Tensor:
    if sapt(model) and "sapt_task" not in kwargs:
        kwargs = {**weights_for(name, len(rows)), **kwargs}
    with torch.no_grad():
        return result(model(**batch_of(name, rows, side, extra), **kwargs))
