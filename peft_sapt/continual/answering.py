"""Answers of a model to the rows of a task, their scores, and the attention on their prompts."""

from __future__ import annotations

import time
from typing import Any

import torch
from peft import PeftModel

from ..arm.progress import counted
from .learner import Bench
from .prompts import left_padded
from .scoring import Labels
from .streams import Row

AT_ONCE = 256  # prompts whose embeddings are held together


@torch.no_grad()
def answers(
    bench: Bench, model: Any, rows: list[Row], *, labels: Labels | None = None, batch_size: int = 50, **kwargs: Any
) -> list[str]:
    """Greedy answers to ``rows``; no task is named unless ``kwargs``, which go to ``generate``, name one.

    Args:
        labels: decode to one of these alone.
    """
    model.eval()
    prompts = bench.prompts(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in counted(range(0, len(rows), batch_size), "  answering, batches", -(-len(rows) // batch_size)):
        picked = by_length[start : start + batch_size]
        batch = left_padded([prompts[i] for i in picked], bench.tokenizer.pad_token_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        skip = 1 if bench.encoder_decoder else batch["input_ids"].shape[1]
        held = {} if labels is None else {"prefix_allowed_tokens_fn": labels.allowed(skip)}
        out = model.generate(
            **batch,
            max_new_tokens=bench.budget.max_answer,
            do_sample=False,
            pad_token_id=bench.tokenizer.pad_token_id,
            **held,
            **kwargs,
        )[:, skip:]
        if labels is None:
            texts = bench.tokenizer.batch_decode(out, skip_special_tokens=True)
        else:
            texts = [labels.text(row) for row in out]
        found.update(zip(picked, texts, strict=True))
    return [found[i].strip() for i in range(len(rows))]


def mean_score(bench: Bench, rows: list[Row], found: list[str]) -> float:
    """Mean score of answers to ``rows`` in percent, best of each row's references."""
    scores = [bench.score(answer, [str(r) for r in row["output"]]) for answer, row in zip(found, rows, strict=True)]
    return sum(scores) / len(scores)


def scored_rows(bench: Bench, name: str, split: str | None = None) -> list[Row]:
    """The rows of a task that are answered: of the bench's split or another one, as many as it asks for."""
    return bench.stream[name][split or bench.split][: bench.test_rows]


def evaluate(bench: Bench, model: Any, names: list[str], split: str | None = None, **kwargs: Any) -> list[float]:
    """Mean score of each task in ``names``, in percent, on the bench's split or another one."""
    begun, means = time.perf_counter(), []
    for name in names:
        rows = scored_rows(bench, name, split)
        means.append(mean_score(bench, rows, answers(bench, model, rows, **kwargs)))
    bench.seconds["evaluation"] = bench.seconds.get("evaluation", 0.0) + time.perf_counter() - begun
    return means


@torch.no_grad()
def weights_of_prompts(bench: Bench, model: PeftModel, name: str, split: str | None = None) -> torch.Tensor:
    """Attention on all prompts of a task's split (the scored one by default), [N, T]."""
    prompts = bench.prompts(bench.stream[name][split or bench.split])
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]  # embeddings of all would be large
    pad = bench.tokenizer.pad_token_id
    counting = counted(parts, f"  reading prompts of {name}, parts", len(parts))
    return torch.cat([model.attention_weights(**left_padded(part, pad)).cpu() for part in counting])
