"""Learning one task of a stream, and scoring tasks: what every method of a benchmark does alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from ..optimizer import create_optimizer
from .frozen_prefix import with_frozen_prefix
from .prompts import Collator, PromptStyle, encode_rows, left_padded
from .scoring import Score
from .streams import Row, Stream


@dataclass
class Budget:
    """What every method gets alike."""

    epochs: float = 3.0
    batch_size: int = 8
    lr: float = 5e-3
    attention_lr: float = 3e-4
    prompt_lr: float = 3e-2
    prompt_epochs: float = 5.0
    virtual_tokens: int = 10
    r: int = 4
    lora_alpha: float = 32.0
    layers: int = 8
    max_answer: int = 6
    generator_epochs: float = 1.5
    generator_batch: int = 8
    generator_lr: float = 5e-3
    draw_batch: int = 64
    align_steps: int = 400
    seed: int = 0


@dataclass
class Bench:
    """A base model, its tokenizer, the stream, and how answers are scored.

    ``split`` is scored after each stage, on ``test_rows`` rows of each task (all by default).
    """

    base: Any
    tokenizer: Any
    stream: Stream
    style: PromptStyle
    score: Score
    budget: Budget
    work: Path
    split: str = "test"
    test_rows: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.base.config.is_encoder_decoder)

    @cached_property
    def remembering(self) -> torch.nn.Module | None:
        """The base model with its frozen lower layers remembered by row, where they can be."""
        layers = self.upper_layers()
        return with_frozen_prefix(self.base, layers[0]) if layers else None

    def fresh(self, adapts_input: bool = False) -> torch.nn.Module:
        """An untouched copy of the base model; ``adapts_input`` for methods whose lower layers see other inputs."""
        known = None if adapts_input else self.remembering
        return copy.deepcopy(self.base if known is None else known)

    def upper_layers(self) -> list[int] | None:
        """Indices of the topmost layers, which alone get blocks: the lower ones then need no backward."""
        count = getattr(self.base.config, "num_hidden_layers", 0)
        return list(range(max(0, count - self.budget.layers), count)) if self.budget.layers else None

    def prompts(self, rows: Iterable[Row]) -> list[list[int]]:
        return [self.style.ids(self.tokenizer, row) for row in rows]


def train(
    bench: Bench,
    model: PeftModel,
    name: str,
    callbacks: list[Any],
    *,
    attention_lr: float | None = None,
    marks_prompts: bool = False,
    lr: float | None = None,
    epochs: float | None = None,
) -> Trainer:
    """Fine-tune ``model`` on task ``name`` with the stock Trainer.

    Args:
        attention_lr: of keys and query projection of a pool; they follow ``lr`` otherwise.
        marks_prompts: give each batch a ``sapt_prompt_mask``, which a pool needs here.
        lr, epochs: the budget's by default.
    """
    budget = bench.budget
    rows = encode_rows(bench.tokenizer, bench.stream[name]["train"], bench.style, budget.max_answer)
    args = TrainingArguments(
        output_dir=str(bench.work / "trainer"),
        num_train_epochs=budget.epochs if epochs is None else epochs,
        per_device_train_batch_size=budget.batch_size,
        learning_rate=budget.lr if lr is None else lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=budget.seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    optimizers = (None, None) if attention_lr is None else create_optimizer(model, args, attention_lr)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=Collator(bench.tokenizer.pad_token_id, bench.encoder_decoder, marks_prompts),
        optimizers=optimizers,
        callbacks=callbacks,
    )
    begun = time.perf_counter()
    trainer.train()
    bench.seconds[f"train {name}"] = time.perf_counter() - begun
    return trainer


@torch.no_grad()
def answers(bench: Bench, model: Any, rows: list[Row], batch_size: int = 50, **kwargs: Any) -> list[str]:
    """Greedy answers to ``rows``; no task is named unless ``kwargs``, which go to ``generate``, name one."""
    model.eval()
    prompts = bench.prompts(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(rows), batch_size):
        picked = by_length[start : start + batch_size]
        batch = left_padded([prompts[i] for i in picked], bench.tokenizer.pad_token_id)
        batch = {k: v.to(model.device) for k, v in batch.items()}
        out = model.generate(
            **batch,
            max_new_tokens=bench.budget.max_answer,
            do_sample=False,
            pad_token_id=bench.tokenizer.pad_token_id,
            **kwargs,
        )
        skip = 1 if bench.encoder_decoder else batch["input_ids"].shape[1]
        texts = bench.tokenizer.batch_decode(out[:, skip:], skip_special_tokens=True)
        found.update(zip(picked, texts, strict=True))
    return [found[i].strip() for i in range(len(rows))]


def evaluate(bench: Bench, model: Any, names: list[str], split: str | None = None, **kwargs: Any) -> list[float]:
    """Mean score of each task in ``names``, in percent, on the bench's split or another one."""
    begun, means = time.perf_counter(), []
    for name in tqdm(names, desc="evaluating", leave=False):
        rows = bench.stream[name][split or bench.split][: bench.test_rows]
        scores = [
            bench.score(a, [str(r) for r in row["output"]])
            for a, row in zip(answers(bench, model, rows, **kwargs), rows, strict=True)
        ]
        means.append(sum(scores) / len(scores))
    bench.seconds["evaluation"] = bench.seconds.get("evaluation", 0.0) + time.perf_counter() - begun
    return means


def stage_row(bench: Bench, model: Any, stage: int, **kwargs: Any) -> list[float]:
    """Scores after a stage, on the tasks learned so far; NaN for the others."""
    names = list(bench.stream)
    return evaluate(bench, model, names[: stage + 1], **kwargs) + [float("nan")] * (len(names) - stage - 1)


@torch.no_grad()
def weights_of_prompts(bench: Bench, model: PeftModel, name: str, split: str | None = None) -> torch.Tensor:
    """Attention on all prompts of a task's split (the scored one by default), [N, T]."""
    prompts = bench.prompts(bench.stream[name][split or bench.split])
    return model.attention_weights(**left_padded(prompts, bench.tokenizer.pad_token_id)).cpu()
