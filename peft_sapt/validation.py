"""Checks of single values that a user or a file gives."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from .errors import SaptError, TaskError, UnsafeNameError

RECORD_FIELDS = {  # what a pool's card says of each task, and what tells its old rows when it is opened again
    "rows": "training rows seen",
    "score": "score",
    "metric": "what the score counts",
    "data": "where the data is from",
    "license": "licence of the data",
    "replay": "what stands for the task in replay",
    "prompts": "short digests of some training prompts",
    "example": "a prompt that may be shown, as it is given to the model",
}
MAX_TEXT = 200
LONGER = {"example": 2000, "prompts": 1000}  # characters of texts that may be longer


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: object) -> TypeGuard[float]:
    return is_number(value) and value > 0


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_token_list(value: object) -> bool:
    """Whether ``value`` is None or a list of token ids that is not empty."""
    return value is None or (isinstance(value, list) and bool(value) and all(is_int(v) and v >= 0 for v in value))


def check_task_name(name: object) -> str:
    """Return ``name`` if it can name a task, else raise [`TaskError`].

    A name becomes part of file names and of JSON, and must never be mistaken for an index.
    """
    cure = "Use a short text such as 'agnews' or 'task_1'."
    if not isinstance(name, str):
        raise TaskError(f"A task name must be a str, got {name!r} of type {type(name).__name__}. {cure}")
    if not name.strip():
        raise TaskError(f"A task name must not be empty, got {name!r}. {cure}")
    if name.isdigit():
        raise TaskError(f"Task name {name!r} is all digits and would read as an index. {cure}")
    if any(c in "/\\." or not c.isprintable() for c in name) or name != name.strip() or len(name) > 128:
        raise UnsafeNameError(
            f"Task name {name!r} has a slash, a dot, an unprintable character, outer whitespace or more than 128 "
            f"characters. {cure}"
        )
    return name


def checked_record(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` without those that are None.

    Raises:
        SaptError: a field is unknown or has a value of the wrong kind; the message names it.
    """
    for name in values:
        if name not in RECORD_FIELDS:
            raise SaptError(f"A task's record has no field {name!r}: it has {list(RECORD_FIELDS)}.")
    found = {name: value for name, value in values.items() if value is not None}
    for name, value in found.items():
        if name == "rows" and not (is_number(value) and value >= 0 and int(value) == value):
            raise SaptError(f"A task's rows must be a whole number, got {value!r}.")
        if name == "score" and not is_number(value):
            raise SaptError(f"A task's score must be a number, got {value!r}.")
        longest = LONGER.get(name, MAX_TEXT)
        if name not in ("rows", "score") and not (isinstance(value, str) and len(value) <= longest):
            raise SaptError(f"A task's {name} must be a text of at most {longest} characters, got {value!r}.")
    return found


def checked_records(records: object, tasks: list[str]) -> dict[str, dict[str, Any]]:
    """Records by task, of the tasks in the pool; raises [`SaptError`] where they are malformed."""
    if records is None:
        return {}
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise SaptError(f"SaptConfig.records must be a dict of dicts by task, got {records!r}.")
    return {name: checked_record(record) for name, record in records.items() if name in tasks}


MAX_BACKGROUND = 1_000_000  # prompts of no task in all


def checked_background(rows: Any, forms: Any) -> tuple[list[int], list[list[list[int]]]]:
    """Numbers of prompts of no task by their form, and the token ids before and after them; raises [`SaptError`]."""
    rows, forms = [] if rows is None else rows, [] if forms is None else forms
    counted = isinstance(rows, list) and all(is_int(n) and n > 0 for n in rows) and sum(rows) <= MAX_BACKGROUND
    if not counted:
        raise SaptError(f"SaptConfig.background_rows must hold positive ints, {MAX_BACKGROUND} in all, got {rows!r}.")
    pairs = isinstance(forms, list) and all(isinstance(form, list) and len(form) == 2 for form in forms)
    if not pairs or not all(isinstance(part, list) and all(map(is_int, part)) for form in forms for part in form):
        raise SaptError(f"SaptConfig.background_forms must hold pairs of lists of token ids, got {forms!r}.")
    if len(rows) != len(forms):
        raise SaptError(f"SaptConfig.background_rows has {len(rows)} entries, background_forms {len(forms)}.")
    return list(rows), list(forms)
