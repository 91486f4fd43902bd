"""Choosing pseudo-samples among what a generator drew: no empty or repeated rows, no verbatim copies."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass, field

MIN_PSEUDO_SAMPLES = 20


@dataclass
class PseudoReport:
    """Counts of one drawing of pseudo-samples."""

    wanted: int
    drawn: int = 0
    unfinished: int = 0
    empty: int = 0
    duplicates: int = 0
    copies: int = 0
    kept: int = 0
    generator_loss: list[float] = field(default_factory=list)  # of the first and the last step
    generator_held_out: list[float] = field(default_factory=list)  # on the held-out prompts, after each pass
    generator_step: int = 0  # whose weights were drawn from

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def wanted_count(rows: int, share: float, minimum: int) -> int:
    """How many pseudo-samples stand for a task of ``rows`` training rows: ``share`` of them, at least ``minimum``."""
    return max(minimum, round(rows * share))


def digest_of(row: list[int]) -> str:
    """What tells a training prompt from all others without keeping it: the first half of its tokens' SHA-256."""
    return hashlib.sha256(",".join(map(str, row)).encode()).hexdigest()[:32]


class Selection:
    """Collects token rows until enough are kept; every refusal is counted in ``report``.

    Args:
        known: digests of the training rows, which no kept row repeats unless ``allow_copies``.
    """

    def __init__(self, wanted: int, known: Collection[str], special: set[int], allow_copies: bool) -> None:
        self.report = PseudoReport(wanted)
        self.kept: list[list[int]] = []
        self.known = set(known)
        self.special = special
        self.allow_copies = allow_copies
        self.taken: set[tuple[int, ...]] = set()

    @property
    def missing(self) -> int:
        return self.report.wanted - len(self.kept)

    def offer(self, row: list[int], finished: bool) -> None:
        """Take one drawn row (token ids without the end token), or count why not."""
        report, key = self.report, tuple(row)
        report.drawn += 1
        if self.missing <= 0:
            return
        if not finished:
            report.unfinished += 1
        elif not set(row) - self.special:
            report.empty += 1
        elif key in self.taken:
            report.duplicates += 1
        elif digest_of(row) in self.known and not self.allow_copies:
            report.copies += 1
        else:
            self.taken.add(key)
            self.kept.append(row)
            report.kept += 1
