"""The stream and the bench that options describe."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import StreamError
from .base import load_base
from .benchmarks import BENCHMARKS, tasks_in_order
from .learner import Bench
from .options import Budget, Data
from .prompts import PromptStyle
from .scoring import METRICS
from .streams import SPLITS, Stream, load_dataset_stream, load_folder, tasks_of

NO_SOURCE = "No tasks: give --tasks-dir FOLDER or --dataset NAME."


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
    base, tokenizer = load_base(data.model, data.cache, getattr(torch, data.dtype))
    work.mkdir(parents=True, exist_ok=True)
    score = METRICS[data.metric]()
    return Bench(
        base, tokenizer, stream, style_of(data), score, budget, work, data.split, data.test_rows, data.report_to
    )
