"""A bench of two tiny tasks, and the same as folders for the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from helpers.tiny import tiny_llama
from helpers.words import tokenizer as make_tokenizer
from peft_sapt.continual.learner import Bench
from peft_sapt.continual.options import Budget
from peft_sapt.continual.prompts import PromptStyle
from peft_sapt.continual.scoring import exact_match

SMALL = [
    "--epochs", "1", "--batch-size", "4", "--layers", "1", "--align-steps", "3", "--max-answer", "2",
    "--max-tokens", "8", "--min-input", "4", "--no-definitions", "--tail", "w5",
]  # fmt: skip  # options of the command line  # fmt: skip


def tiny_bench(work: Path, rows: int = 8) -> Bench:
    """Two tasks of four words each, whose answers are two of them, on a tiny random model."""
    torch.manual_seed(0)
    rng = random.Random(0)
    words = {"first": ["w10", "w11", "w12", "w13"], "second": ["w20", "w21", "w22", "w23"]}

    def row(own: list[str]) -> dict[str, object]:
        picked = rng.choices(own, k=5)
        return {"instruction": "", "input": " ".join(picked), "output": [own[picked[0] in own[:2]]]}

    splits = ("train", "validation", "test")
    stream = {task: {split: [row(own) for _ in range(rows)] for split in splits} for task, own in words.items()}
    budget = Budget(epochs=1.0, batch_size=4, layers=1, align_steps=3, max_answer=2)
    style = PromptStyle(head="", tail="", definitions=False, max_tokens=8, min_input=4)
    return Bench(tiny_llama(), make_tokenizer(), stream, style, exact_match, budget, work)


def save_model(folder: Path) -> Path:
    """The base model and its tokenizer."""
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_tasks(folder: Path) -> Path:
    """The stream as JSON lines."""
    for name, splits in tiny_bench(folder, rows=16).stream.items():
        for split, rows in splits.items():
            (folder / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
