"""Fields of the dataclasses that a command line and a YAML file are made from."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def described(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with its help text, and the values that it may have; lists are copied."""
    about: dict[str, Any] = {"metadata": {"help": text, "choices": choices}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), **about)
    return field(default=default, **about)
