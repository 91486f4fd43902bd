"""What every method of a benchmark gets alike: base model, stream, budget, and one way to train on a task."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from ..optimizer import create_optimizer
from .frozen_prefix import with_frozen_prefix
from .options import Budget
from .progress import TaskProgress
from .prompts import Collator, PromptStyle, encode_rows
from .scoring import Score
from .streams import Row, Stream


@dataclass
class Bench:
    """A base model, its tokenizer, the stream, and how answers are scored.

    ``split`` is scored after each stage, on ``test_rows`` rows of each task (all by default). ``report_to`` goes to
    the Trainer: losses and what a method logs reach TensorBoard and the like.
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
    report_to: str = "none"
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


Penalty = Callable[[nn.Module], Tensor]


class PenaltyTrainer(Trainer):
    """The stock Trainer with one more term in the loss, a scalar that a function of the model gives at each step."""

    penalty: Penalty | None = None

    # the further arguments differ between versions of transformers
    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        found: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        if self.penalty is None or not model.training:
            return found
        loss, *rest = found if return_outputs else (found,)
        loss = loss + self.penalty(model)
        return (loss, *rest) if return_outputs else loss


def train(
    bench: Bench,
    model: nn.Module,
    name: str,
    callbacks: list[Any],
    *,
    rows: list[dict[str, list[int]]] | None = None,
    penalty: Penalty | None = None,
    attention_lr: float | None = None,
    marks_prompts: bool = False,
    lr: float | None = None,
    epochs: float | None = None,
) -> Trainer:
    """Fine-tune ``model`` on task ``name`` with the stock Trainer.

    Args:
        rows: encoded rows to train on in place of the task's.
        penalty: added to the loss of every step.
        attention_lr: of keys and query projection of a pool; they follow ``lr`` otherwise.
        marks_prompts: give each batch a ``sapt_prompt_mask``, which a pool needs here.
        lr, epochs: the budget's by default.
    """
    budget = bench.budget
    args = TrainingArguments(
        output_dir=str(bench.work / "trainer"),
        run_name=name,
        num_train_epochs=budget.epochs if epochs is None else epochs,
        per_device_train_batch_size=budget.batch_size,
        learning_rate=budget.lr if lr is None else lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=4,
        weight_decay=0.0,
        logging_steps=10,
        save_strategy="no",
        report_to=bench.report_to,
        seed=budget.seed,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = PenaltyTrainer(
        model=model,
        args=args,
        train_dataset=encoded(bench, name) if rows is None else rows,
        data_collator=Collator(bench.tokenizer.pad_token_id, bench.encoder_decoder, marks_prompts),
        optimizers=(None, None) if attention_lr is None else create_optimizer(model, args, attention_lr),
        callbacks=[TaskProgress(name), *callbacks],
    )
    trainer.penalty = penalty
    trainer.remove_callback(PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    bench.seconds[f"train {name}"] = time.perf_counter() - begun
    return trainer


def encoded(bench: Bench, name: str) -> list[dict[str, list[int]]]:
    """The training rows of a task as token ids of prompt and answer."""
    return encode_rows(bench.tokenizer, bench.stream[name]["train"], bench.style, bench.budget.max_answer)
