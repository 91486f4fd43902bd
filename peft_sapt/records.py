"""What a pool says of each task in its card: rows seen, score, where the data is from and under which licence."""

from __future__ import annotations

from typing import Any

from .errors import SaptError
from .validation import number

FIELDS = {
    "rows": "training rows seen",
    "score": "score",
    "metric": "what the score counts",
    "data": "where the data is from",
    "license": "licence of the data",
    "replay": "what stands for the task in replay",
}
MAX_TEXT = 200


def checked_record(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` without those that are None.

    Raises:
        SaptError: a field is unknown or has a value of the wrong kind; the message names it.
    """
    found = {name: value for name, value in values.items() if value is not None}
    for name, value in found.items():
        if name not in FIELDS:
            raise SaptError(f"A task's record has no field {name!r}: it has {list(FIELDS)}.")
        if name == "rows" and not (number(value) and value >= 0 and int(value) == value):
            raise SaptError(f"A task's rows must be a whole number, got {value!r}.")
        if name == "score" and not number(value):
            raise SaptError(f"A task's score must be a number, got {value!r}.")
        if name not in ("rows", "score") and not (isinstance(value, str) and len(value) <= MAX_TEXT):
            raise SaptError(f"A task's {name} must be a text of at most {MAX_TEXT} characters, got {value!r}.")
    return found


def checked_records(records: object, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """Records by task, of the tasks in the pool; raises [`SaptError`] where they are malformed."""
    if records is None:
        return {}
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise SaptError(f"SaptConfig.records must be a dict of dicts by task, got {records!r}.")
    return {name: checked_record(record) for name, record in records.items() if name in tasks}
