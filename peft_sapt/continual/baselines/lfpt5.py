"""LFPT5: one soft prompt that answers and also generates training rows, so that it can replay its older tasks."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..learner import Bench, encoded
from ..method import Found
from ..prompts import Collator, left_padded
from .prefixed import PrefixedModel, PromptMethod
from .replay import LEAST, SHARE

Encoded = dict[str, list[int]]
START = "__gen__"


@dataclass
class Weights:
    """Of the generator's loss and of the distillation; the values are ours."""

    generator: float = 0.5
    distillation: float = 0.05


class OnePrompt(nn.Module):
    """The same virtual tokens [P, d] for every row."""

    def __init__(self, prompt: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(prompt)

    def forward(self, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        return self.prompt.expand(len(input_ids), -1, -1)


class LFPT5(PromptMethod):
    """Loss = answering + w_g generating + w_d KL(old prompt || new prompt) on generated rows of older tasks.

    Source: Qin and Joty, *LFPT5: A Unified Framework for Lifelong Few-shot Language Learning Based on Prompt Tuning of
    T5*, ICLR 2022, section 3: both losses are of the same prompt; before a new task it generates rows of the older
    ones, which are answered beside the new rows, and on which the answers of the old prompt are kept by the KL term.
    """

    title = "LFPT5"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.model = PrefixedModel(bench.fresh(adapts_input=True), OnePrompt(self.start(bench.budget.virtual_tokens)))
        self.weights = Weights()
        self.start_ids = bench.tokenizer(START, add_special_tokens=False).input_ids
        self.wanted = 0
        self.drawn: list[int] = []

    def learn(self, name: str) -> None:
        pseudo = self.draw(self.wanted) if self.wanted else []
        self.drawn.append(len(pseudo))
        own = encoded(self.bench, name)
        old = copy.deepcopy(self.model.virtual)
        batches = {
            "generator": self.batches([self.generator_row(row) for row in own + pseudo]),
            "distillation": self.batches(pseudo) if pseudo else None,
        }
        self.train(name, rows=own + pseudo, penalty=lambda model: self.joint(model, old, batches))
        self.wanted += min(len(own), max(LEAST, round(SHARE * len(own))))

    def joint(self, model: PrefixedModel, old: nn.Module, batches: dict[str, Any]) -> Tensor:
        """The two further terms of the loss, on the next batch of each."""
        term = self.weights.generator * model(**next(batches["generator"])).loss
        if batches["distillation"] is None:
            return term
        batch = next(batches["distillation"])
        return term + self.weights.distillation * distillation(model, old, batch)

    def generator_row(self, row: Encoded) -> Encoded:
        """Prompt and answer of ``row`` as one text to generate."""
        return {"prompt": self.start_ids, "answer": row["prompt"] + row["answer"]}

    def batches(self, rows: list[Encoded]) -> Iterator[dict[str, Tensor]]:
        """Batches without end, drawn again from ``rows`` in an order of the seed."""
        bench = self.bench
        collate = Collator(bench.tokenizer.pad_token_id, bench.encoder_decoder, sapt=True)
        rng = random.Random(bench.budget.seed)
        size = min(len(rows), bench.budget.batch_size)
        while True:
            batch = collate(rng.sample(rows, size))
            yield {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @torch.no_grad()
    def draw(self, count: int, rounds: int = 4) -> list[Encoded]:
        """Up to ``count`` different generated rows that read as a prompt and an answer."""
        bench = self.bench
        self.model.eval()
        found: dict[tuple[int, ...], Encoded] = {}
        start = left_padded([self.start_ids] * bench.budget.draw_batch, bench.tokenizer.pad_token_id)
        batch: dict[str, Any] = {k: v.to(self.model.device) for k, v in start.items()}
        skip = 1 if bench.encoder_decoder else len(self.start_ids)
        longest = bench.style.max_tokens + bench.budget.max_answer
        for _ in range(rounds):
            out = self.model.generate(
                **batch, do_sample=True, top_k=20, max_new_tokens=longest, pad_token_id=bench.tokenizer.pad_token_id
            )
            for ids in out[:, skip:].tolist():
                row = self.parsed(ids)
                if row is not None:
                    found.setdefault(tuple(row["prompt"]), row)
            if len(found) >= count:
                break
        return list(found.values())[:count]

    def parsed(self, ids: list[int]) -> Encoded | None:
        """Generated tokens as a row: the prompt up to its tail ("Output:"), then the answer and the end token."""
        tail = self.bench.tokenizer(self.bench.style.tail, add_special_tokens=False).input_ids
        end = self.bench.tokenizer.eos_token_id
        if end not in ids:
            return None
        ids = ids[: ids.index(end) + 1]
        at = [i for i in range(1, len(ids) - len(tail)) if ids[i : i + len(tail)] == tail]
        if not tail or not at or at[-1] + len(tail) >= len(ids) - 1:
            return None
        cut = at[-1] + len(tail)
        return {"prompt": ids[:cut], "answer": ids[cut:]}

    def extra_results(self) -> Found:
        return {"baseline": {**asdict(self.weights), "generated_rows": self.drawn}}


def distillation(model: PrefixedModel, old: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Mean over answer tokens of KL(p under the old prompt || p under the model's), zero where the prompts agree."""
    new = answer_logits(model, batch)
    with torch.no_grad():
        current, model.virtual = model.virtual, old
        target = answer_logits(model, batch)
        model.virtual = current
    return torch.nn.functional.kl_div(
        new.log_softmax(dim=-1), target.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )


def answer_logits(model: PrefixedModel, batch: dict[str, Any]) -> Tensor:
    """Logits [N, V] in float32 that predict the N answer tokens of a batch."""
    labels = batch["labels"]
    logits = model(**batch).logits  # [B, A, V]
    if not model.config.is_encoder_decoder:
        labels, logits = labels[:, 1:], logits[:, :-1]
    return logits[labels != -100].float()
