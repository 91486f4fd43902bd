"""The options that the examples share: those of `peft-sapt train`, over the same dataclasses."""

from __future__ import annotations

import argparse
import os
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from synthetic import make_stream

from peft_sapt.continual.learner import Bench
from peft_sapt.continual.options import Budget, Data
from peft_sapt.continual.settings import make_bench
from peft_sapt.errors import SaptError

QUICK_ROWS, QUICK_TESTS = 40, 10


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    for cls in (Data, Budget):
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            about = item.metadata["help"].replace("%", "%%")
            help_text = about if default is None else f"{about}; default {default!r}"
            flag = "--" + item.name.replace("_", "-")
            parser.add_argument(flag, default=default, help=help_text, **kind_of(hints[item.name], item.metadata))
    return parser


def kind_of(hint: Any, metadata: Any) -> dict[str, Any]:
    inner = next((arg for arg in typing.get_args(hint) if arg is not type(None)), hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(inner) is list:
        return {"type": lambda text: text.split(",")}
    return {"type": inner, "choices": metadata["choices"] or None}


def set_up(args: argparse.Namespace, work: Path, quick: bool = False) -> Bench:
    """The bench that ``args`` describe, on the made-up stream if they name no tasks.

    ``quick`` cuts the stream to what only shows that everything works.
    """
    data, budget = (cls(**{item.name: getattr(args, item.name) for item in fields(cls)}) for cls in (Data, Budget))
    stream = make_stream(budget.seed) if data.tasks_dir is None and data.dataset is None else None
    if quick:
        stream = None if stream is None else dict(list(stream.items())[:2])
        data.rows, data.test_rows, budget.generator_epochs = QUICK_ROWS, QUICK_TESTS, 4.0
    try:
        return make_bench(data, budget, work, stream)
    except SaptError as error:
        raise SystemExit(str(error)) from None
