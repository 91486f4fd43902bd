"""The options that the examples share: model, stream, prompts, scoring and budget."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from synthetic import make_stream

from peft_sapt.continual.base import load_base
from peft_sapt.continual.learner import Bench, Budget
from peft_sapt.continual.prompts import PromptStyle
from peft_sapt.continual.scoring import METRICS
from peft_sapt.continual.streams import load_folder
from peft_sapt.errors import StreamError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="Hub id or folder; default: SmolLM2-135M from PyPI")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the base; blocks stay float32")
    parser.add_argument("--tasks-dir", type=Path, help="folder of <task>.{train,validation,test}.jsonl[.gz]")
    parser.add_argument("--order", type=lambda text: text.split(","), help="tasks of the folder, comma separated")
    parser.add_argument("--metric", choices=list(METRICS), default="exact")
    parser.add_argument("--head", default="{definition}\n", help="text before the input; {definition} is filled in")
    parser.add_argument("--tail", default="\nOutput:", help="text after the input")
    parser.add_argument("--no-definitions", action="store_true", help="leave the task definition out of all prompts")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest prompt; only the input is cut")
    parser.add_argument("--min-input", type=int, default=24, help="tokens of the input that are never cut")
    parser.add_argument("--rows", type=int, help="training rows per task")
    parser.add_argument("--test-rows", type=int, help="rows per task to answer; routing is measured on all")
    parser.add_argument("--split-rows", type=int, help="validation and test rows per task that are read at all")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="split that is scored")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    for item in fields(Budget):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=item.default, help=f"default {item.default}")
    return parser


def set_up(args: argparse.Namespace, work: Path, quick: bool = False) -> Bench:
    """The bench that ``args`` describe; ``quick`` cuts the stream to what only shows that everything works."""
    budget = Budget(**{item.name: getattr(args, item.name) for item in fields(Budget)})
    rows, tests = args.rows, args.test_rows
    style = PromptStyle(args.head, args.tail, not args.no_definitions, args.max_tokens, args.min_input)
    try:
        stream = make_stream(args.seed) if args.tasks_dir is None else load_folder(args.tasks_dir, args.order)
        base, tokenizer = load_base(args.model, args.cache, DTYPES[args.dtype])
    except StreamError as error:
        raise SystemExit(str(error)) from None
    if quick:
        stream = dict(list(stream.items())[:2])
        rows, tests, budget.generator_epochs = 40, 10, 4.0
    for splits in stream.values():
        splits["train"] = splits["train"][:rows]
        splits |= {name: splits[name][: args.split_rows] for name in ("validation", "test")}
    work.mkdir(parents=True, exist_ok=True)
    return Bench(base, tokenizer, stream, style, METRICS[args.metric](), budget, work, args.split, tests)
