"""Scoring of answers against references, in percent."""

from __future__ import annotations

import re
import string
from collections.abc import Callable

Score = Callable[[str, list[str]], float]


def normalised(text: str) -> str:
    """Lower case, without punctuation and surplus blanks."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split())


def exact_match(answer: str, references: list[str]) -> float:
    """100 if the answer equals one of the references once both are normalised, else 0."""
    return 100.0 * any(normalised(answer) == normalised(reference) for reference in references)


def rouge_l() -> Score:
    """ROUGE-L F1 with stemming, best of the references (package rouge-score)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return lambda answer, references: (
        100.0 * max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    )


METRICS: dict[str, Callable[[], Score]] = {"exact": lambda: exact_match, "rougeL": rouge_l}
