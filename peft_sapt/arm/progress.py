"""What takes more than a few seconds says so: by a bar in a terminal, by a line now and then in a log without one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm.auto import tqdm

from .processes import is_first_process

T = TypeVar("T")
EVERY = 15.0  # seconds between lines of a log
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_begun = time.monotonic()
_said_at = [_begun]  # when the last line was written, by whomever in this process


@contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Nothing is said inside, if that is ``wanted``."""
    token = _quiet.set(_quiet.get() or wanted)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_silent() -> bool:
    """Whether this process says nothing: it was told so, is not the first of several, or has nowhere to say it."""
    return _quiet.get() or sys.stderr is None or not is_first_process()


def in_terminal() -> bool:
    """Whether standard error is a terminal, on which a bar can be drawn."""
    asked = getattr(sys.stderr, "isatty", None)
    return bool(asked()) if callable(asked) else False


def say(text: str) -> None:
    """Write a line to standard error, with the seconds since this package was imported."""
    if is_silent():
        return
    _said_at[0] = time.monotonic()
    tqdm.write(f"[{_said_at[0] - _begun:6.0f} s] {text}", file=sys.stderr)


def counted(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """``items`` one after another, each being worked on before the next is asked for; ``what`` is done with them."""
    if is_silent():
        yield from items
        return
    if in_terminal():
        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    begun = time.monotonic()
    of = "" if total is None else f" of {total}"
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) - _said_at[0] >= EVERY:
            say(f"{what}: {done}{of} done in {now - begun:.0f} s")
