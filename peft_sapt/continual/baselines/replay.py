"""Replay: one LoRA, and a few real rows of every old task mixed into the new one's."""

from __future__ import annotations

import json
import random

from ..bounds import Sequential
from ..learner import Bench, train
from ..prompts import encode_rows
from ..streams import Row

SHARE, LEAST = 0.02, 20  # of a task's training rows; as many as SAPT keeps pseudo-samples (SAPT, section 4.1)


class Replay(Sequential):
    """Keeps 2 % of each task's rows, at least 20, drawn at random, and trains on them with every later task.

    Source: experience replay (Chaudhry et al., 2019, arXiv:1902.10486) as the SAPT paper compares with it.
    """

    title = "Replay"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.memory: dict[str, list[Row]] = {}

    def learn(self, name: str) -> None:
        bench, rows = self.bench, self.bench.stream[name]["train"]
        mixed = rows + [row for kept in self.memory.values() for row in kept]
        train(
            bench, self.model, name, [],
            rows=encode_rows(bench.tokenizer, mixed, bench.style, bench.budget.max_answer),
        )  # fmt: skip
        count = min(len(rows), max(LEAST, round(SHARE * len(rows))))
        self.memory[name] = random.Random(bench.budget.seed).sample(rows, count)

    def stored_bytes(self) -> int:
        return super().stored_bytes() + len(json.dumps(self.memory).encode())
