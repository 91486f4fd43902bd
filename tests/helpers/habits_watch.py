"""What is watched while habits are walked: a subject and its bytes, the weights of forwards, what queries read."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_sapt.routing.hooks as routing_hooks
from helpers.tiny import PAD, VOCAB
from helpers.words import collate, rows_of
from peft_sapt import SaptConfig

ANSWERS = 70  # ids from here on are answers; no prompt has one
ROWS = 16


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 3, "eos_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **ids, num_key_value_heads=2))
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def config(kind: dict[str, str], task: str) -> SaptConfig:
    extra = {"num_virtual_tokens": 3} if kind["block"] == "prompt" else {}
    return SaptConfig(task_type="CAUSAL_LM", task_name=task, r=2, query_dim=4, temperature=0.5, **kind, **extra)


@dataclass
class Subject:
    """A model, and what is known of its pools."""

    model: Any
    committed: dict[tuple[str, str], str] = field(default_factory=dict)  # (adapter, task) -> digest of its bytes
    told: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # whose rows each task was trained on

    @property
    def adapter(self) -> str:
        return self.model.active_adapter

    @property
    def memory(self) -> Any:
        return self.model.base_model.hooks.memory

    def is_open(self) -> bool:
        return self.model.current_task not in self.model.committed_tasks

    def digest(self, task: str) -> str:
        state = self.model.task_state(task)
        parts = [state[key].contiguous().numpy().tobytes() for key in sorted(state) if "sapt_solved" not in key]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def freeze(self) -> None:
        """Remember the bytes of what is committed and not the newest: the newest may be reopened."""
        for task in self.model.committed_tasks:
            if task != self.model.current_task:
                self.committed.setdefault((self.adapter, task), self.digest(task))


def check_rows(subject: Subject) -> None:
    """Each replay row is a prompt of the data that its task was trained on with this very pool."""
    for task, rows in zip(subject.model.tasks, subject.memory.replay(subject.adapter), strict=True):
        told = subject.told.get((subject.adapter, task), set())
        if len(rows):
            own = [subject.model.pooled_prompts([collate(rows_of(letter, count=ROWS))]) for letter in sorted(told)]
            known = torch.cat(own) if own else rows[:0]
            near = [bool((known - row).abs().amax(dim=1).min() < 1e-5) if len(known) else False for row in rows]
            assert all(near), f"replay rows of task {task!r} are not of its own data"


def check_weights(subject: Subject, letter: str, ours: Callable[[Callable[[], Any]], Any]) -> None:
    """Prompts of the task ``letter``, asked in every way; ``ours`` calls what may be refused."""
    model, was_training = subject.model, subject.model.training
    batch = collate(rows_of(letter, count=3, seed=5))
    labelled = batch["labels"] != -100
    lengths = labelled.float().argmax(dim=1)
    mask = torch.arange(batch["input_ids"].shape[1]) < lengths.unsqueeze(1)
    expected = model.attention_weights(batch["input_ids"], mask.long())
    ways: dict[str, Callable[[], Any]] = {
        "evaluation": lambda: model.eval()(**batch),
        "attention_weights": lambda: model.attention_weights(**batch),
        "generation": lambda: model.eval().generate(batch["input_ids"], attention_mask=mask.long(), max_new_tokens=1),
    }
    for way, call in ways.items():
        with torch.no_grad(), Weights(model) as used:
            found = call()
        weights = found if way == "attention_weights" else used.last()
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0, msg=lambda m, w=way: f"{w}: {m}")
    remembered = copy.copy(subject.memory._seen), copy.deepcopy(subject.memory._training)
    with Weights(model) as used:
        if ours(lambda: (model.train()(**batch), True)):
            torch.testing.assert_close(used.last(), expected, atol=1e-6, rtol=0, msg=lambda m: f"training: {m}")
    subject.memory._seen, subject.memory._training = remembered
    model.train(was_training)


class Weights:
    """The weights that forwards of ``model`` take, while it is entered."""

    def __init__(self, model: Any) -> None:
        self.hooks, self.seen = model.base_model.hooks, []

    def __enter__(self) -> Weights:
        compute = self.hooks.mixture_for

        def noted(*args: Any, **more: Any) -> Any:
            mixture = compute(*args, **more)
            self.seen.append(mixture.weights.detach().clone())
            return mixture

        self.hooks.mixture_for = noted
        return self

    def __exit__(self, *error: Any) -> None:
        del self.hooks.mixture_for

    def last(self) -> torch.Tensor:
        return self.seen[-1]


class no_answers_read:
    """While it is entered, no query may hold the id of an answer."""

    def __enter__(self) -> None:
        self.read = read = routing_hooks.read_prompts

        def looked_at(module: Any, config: Any, pooling: Any, inputs: dict[str, Any], training: bool) -> Any:
            prompts = read(module, config, pooling, inputs, training)
            ids = inputs.get("input_ids")
            assert ids is None or not bool((prompts.mask & (ids >= ANSWERS)).any()), "an answer token is in a query"
            return prompts

        routing_hooks.read_prompts = looked_at

    def __exit__(self, *error: Any) -> None:
        routing_hooks.read_prompts = self.read
