"""A stream of tasks on disk, its prompts, and batches of token ids."""

from __future__ import annotations

import gzip
import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")


@dataclass
class PromptStyle:
    """How a row becomes a prompt. Only the input is cut to fit, to ``min_input`` tokens at
    least; definition and "Output:" always stay."""

    head: str = "{definition}\n"
    tail: str = "\nOutput:"
    definitions: bool = True
    max_tokens: int = 96
    min_input: int = 24

    def ids(self, tokenizer: Any, row: Row) -> list[int]:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False).input_ids

        shown = bool(self.definitions and row["instruction"])
        head = encode(self.head.format(definition=row["instruction"])) if shown else []
        tail = encode(self.tail)
        room = max(self.min_input, self.max_tokens - len(head) - len(tail))
        return head + encode(str(row["input"]))[:room] + tail


def load_folder(folder: Path, order: list[str] | None) -> dict[str, dict[str, list[Row]]]:
    """Tasks of ``folder`` (``<task>.{train,validation,test}.jsonl[.gz]``) in ``order``, by default alphabetical.

    Raises:
        SystemExit: a task or split is missing; the message lists what is there.
    """
    files = {path.name.split(".jsonl")[0]: path for path in folder.glob("*.jsonl*")}
    known = sorted({name.rsplit(".", 1)[0] for name in files})
    wanted = known if order is None else order
    missing = [f"{name}.{split}" for name in wanted for split in SPLITS if f"{name}.{split}" not in files]
    if missing or not wanted:
        raise SystemExit(
            f"{folder} lacks {missing or 'any task'}; tasks there: {known}. Check --tasks-dir and --order."
        )
    return {name: {split: _read(files[f"{name}.{split}"]) for split in SPLITS} for name in wanted}


def _read(path: Path) -> list[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream if line.strip()]
    return [{**row, "output": row["output"] if isinstance(row["output"], list) else [row["output"]]} for row in rows]


def encode_rows(tokenizer: Any, rows: list[Row], style: PromptStyle, max_answer: int) -> list[dict[str, list[int]]]:
    """Prompt and first reference answer of each row as token ids; the answer ends with the end token."""
    encoded = []
    for row in rows:
        answer = tokenizer(" " + str(row["output"][0]), add_special_tokens=False).input_ids[: max_answer - 1]
        encoded.append({"prompt": style.ids(tokenizer, row), "answer": [*answer, tokenizer.eos_token_id]})
    return encoded


class Collator:
    """Batches for training, padded on the left so that all answers end together.

    For a decoder-only model the logits, by far the widest tensor, are then needed for the last positions alone:
    ``logits_to_keep`` says so, ``labels`` cover just these, and ``sapt_prompt_mask`` marks the prompt.
    """

    def __init__(self, pad: int, encoder_decoder: bool, sapt: bool) -> None:
        self.pad, self.encoder_decoder, self.sapt = pad, encoder_decoder, sapt

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        answers = max(len(row["answer"]) for row in rows)
        labels = torch.tensor([[-100] * (answers - len(r["answer"])) + r["answer"] for r in rows])
        if self.encoder_decoder:
            labels = torch.tensor([r["answer"] + [-100] * (answers - len(r["answer"])) for r in rows])
            return {**left_padded([r["prompt"] for r in rows], self.pad), "labels": labels}
        batch: dict[str, Any] = left_padded([r["prompt"] + r["answer"] for r in rows], self.pad)
        width = batch["input_ids"].shape[1]
        if self.sapt:
            prompt = torch.zeros(len(rows), width, dtype=torch.bool)
            for i, row in enumerate(rows):
                end = width - len(row["answer"])
                prompt[i, end - len(row["prompt"]) : end] = True
            batch["sapt_prompt_mask"] = prompt
        pad_one = torch.full((len(rows), 1), -100)  # the position that predicts the first answer token
        return {**batch, "labels": torch.cat([pad_one, labels], dim=1), "logits_to_keep": answers + 1}


def left_padded(rows: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def normalised(text: str) -> str:
    """Lower case, without punctuation and surplus blanks."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split())


def exact_match(answer: str, references: list[str]) -> float:
    return 100.0 * any(normalised(answer) == normalised(reference) for reference in references)


def rouge_l() -> Callable[[str, list[str]], float]:
    """ROUGE-L F1 with stemming, best of the references (package rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda answer, references: (
        100.0 * max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    )
