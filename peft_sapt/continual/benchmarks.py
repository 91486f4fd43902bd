"""The two benchmarks of the SAPT paper by name: their tasks, orders, templates and metrics (section 4.1, appendix A).

The data are not part of this package: bring them as a folder of JSONL or a dataset.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import StreamError


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark fixes: task orders by name, the text around an input, the metric and the length of answers.

    ``max_answer`` is in tokens, the end token included; the official code generates up to 50.
    """

    orders: dict[str, tuple[str, ...]]
    head: str
    metric: str
    max_answer: int = 50
    tail: str = "\nOutput:"


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BENCHMARKS = {
    "superni": Benchmark(
        orders={
            "order1": _names("1572 363 1290 181 002 1510 639 1729 073 1590 748 511 591 1687 875"),
            "order2": _names("748 073 1590 639 1572 1687 591 363 1510 1729 181 511 002 1290 875"),
        },
        head="Definition: {definition}\n\nNow complete the following example -\nInput: ",
        metric="rougeL",
    ),
    "long_sequence": Benchmark(
        orders={
            "order3": _names(
                "mnli cb wic copa qqp boolq rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo"
            ),
            "order4": _names(
                "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolq wic"
            ),
        },
        head="{definition}\n",
        metric="exact",
    ),
}  # fmt: skip


def tasks_in_order(order: tuple[str, ...], available: list[str], skip_missing: bool = False) -> list[str]:
    """The names in ``available`` of a benchmark's tasks, in its order.

    SuperNI's tasks go by number, and a name such as "task1572_samsum_summary" is found by it.

    Args:
        skip_missing: take the sub-stream of the tasks that are there.

    Raises:
        StreamError: tasks are missing and may not be skipped, or none is there.
    """
    found = {entry: next((name for name in available if is_task(name, entry)), None) for entry in order}
    missing = [entry for entry, name in found.items() if name is None]
    if len(missing) == len(order):
        raise StreamError(f"None of the benchmark's tasks is there: it has {list(order)}, there are {available}.")
    if missing and not skip_missing:
        raise StreamError(
            f"Of the benchmark's {len(order)} tasks {len(missing)} are missing: {missing}. Add them, or ask for the "
            "sub-stream of those that are there: --missing skip."
        )
    return [name for name in found.values() if name is not None]


def is_task(name: str, entry: str) -> bool:
    """Whether a task's ``name`` is the benchmark's ``entry``."""
    return name == entry or (entry.isdigit() and re.match(rf"task0*{int(entry)}(_|$)", name) is not None)
