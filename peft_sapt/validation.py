"""Checks of single values that a user or a file gives."""

from __future__ import annotations

import math

from .errors import TaskError, UnsafeNameError


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def positive(value: object) -> bool:
    return number(value) and value > 0  # type: ignore[operator]


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
