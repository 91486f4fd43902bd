"""Scoring of answers against references, in percent; and decoding that can only answer with a task's own labels.

Free answers lose points for a lost format as well as for a lost skill. Constrained ones lose them for the skill alone,
so the two together tell what was forgotten.
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import StreamError
from .streams import Row

Score = Callable[[str, list[str]], float]
MAX_LABELS = 32
ROWS_PER_LABEL = 4
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation and surplus blanks, as in the official scorer (SuperNI's, after SQuAD's)."""
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(answer: str, references: list[str]) -> float:
    """100 if the answer equals one of the references once both are normalised, else 0."""
    return 100.0 * any(normalised(answer) == normalised(reference) for reference in references)


def rouge_l() -> Score:
    """ROUGE-L F1 with stemming, best of the references (package rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def rouge_l_f1(answer: str, references: list[str]) -> float:
        return 100.0 * max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)

    return rouge_l_f1


METRICS: dict[str, Callable[[], Score]] = {"exact": lambda: exact_match, "rougeL": rouge_l}


def label_set(splits: dict[str, list[Row]]) -> list[str] | None:
    """The labels of a task, sorted, or None if its answers are free text.

    A task has labels if every training and validation row has one accepted answer, and there are at most
    ``MAX_LABELS`` of them with ``ROWS_PER_LABEL`` rows each on average. Test rows are not looked at.
    """
    rows = splits["train"] + splits["validation"]
    labels = sorted({str(row["output"][0]) for row in rows})
    many = len(labels) > MAX_LABELS or len(rows) < ROWS_PER_LABEL * len(labels)
    return None if many or any(len(row["output"]) > 1 for row in rows) else labels


class Labels:
    """A task's labels as token sequences: greedy decoding that is held to them ends in exactly one."""

    def __init__(self, tokenizer: Any, labels: list[str], max_answer: int) -> None:
        self.end = int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)
        self.by_tokens: dict[tuple[int, ...], str] = {}
        self.next: dict[tuple[int, ...], list[int]] = {}
        for label in labels:
            tokens = answer_ids(tokenizer, label, max_answer)
            other = self.by_tokens.setdefault(tuple(tokens), label)
            if _tokens(tokenizer, other) != _tokens(tokenizer, label):
                raise StreamError(
                    f"The labels {other!r} and {label!r} are the same in their first {max_answer - 1} tokens, where "
                    "answers are cut: raise --max-answer."
                )
            for i, token in enumerate(tokens):
                following = self.next.setdefault(tuple(tokens[:i]), [])
                if token not in following:
                    following.append(token)

    def allowed(self, skip: int) -> Callable[[int, Tensor], list[int]]:
        """``prefix_allowed_tokens_fn`` of ``generate``, for sequences whose first ``skip`` tokens are no answer."""

        def allow(row: int, ids: Tensor) -> list[int]:
            return self.next.get(tuple(ids[skip:].tolist()), [self.pad if self.end in ids[skip:] else self.end])

        return allow

    def text(self, ids: Tensor) -> str:
        """The label that answer tokens [N] stand for."""
        tokens = ids.tolist()
        return self.by_tokens[tuple(tokens[: tokens.index(self.end) + 1])]


def answer_ids(tokenizer: Any, answer: str, max_answer: int) -> list[int]:
    """An answer as it is trained and constrained: a blank before it, cut, and the end token, up to ``max_answer``."""
    return [*_tokens(tokenizer, answer)[: max_answer - 1], tokenizer.eos_token_id]


def warn_of_cut_answers(tokenizer: Any, name: str, rows: list[Row], max_answer: int) -> None:
    """Say so if answers of task ``name`` are longer than what is trained and generated: they cannot be right."""
    cut = [str(row["output"][0]) for row in rows if len(_tokens(tokenizer, str(row["output"][0]))) >= max_answer]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(rows)} answers of task {name!r} are cut to {max_answer - 1} tokens, as "
            f"{cut[0][:80]!r}: raise --max-answer.",
            stacklevel=2,
        )


def _tokens(tokenizer: Any, answer: str) -> list[int]:
    return list(tokenizer(" " + answer, add_special_tokens=False).input_ids)
