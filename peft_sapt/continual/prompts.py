"""Prompts of a stream's rows, and batches of their token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .scoring import answer_ids
from .streams import Row


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


def encode_rows(tokenizer: Any, rows: list[Row], style: PromptStyle, max_answer: int) -> list[dict[str, list[int]]]:
    """Prompt and first reference answer of each row as token ids; the answer ends with the end token."""
    encoded = []
    for row in rows:
        answer = answer_ids(tokenizer, str(row["output"][0]), max_answer)
        encoded.append({"prompt": style.ids(tokenizer, row), "answer": answer})
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
