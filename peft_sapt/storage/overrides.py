"""Loading in spite of a refusal: each check that a load makes can be switched off by its name, for a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..errors import SaptError

REFUSALS = {
    "other_base": "the base model is not the one that the pool was made for",
    "changed_tensors": "tensors are not what was saved",
    "missing_tensors": "tensors that were saved are not there; they stay as a new pool has them",
    "unknown_tensors": "there are tensors that were not saved",
    "nonfinite": "tensors hold NaN or infinity",
    "newer_format": "the pool was saved by a later version, in a format that this one does not know",
    "unmarked_checkpoint": "a Trainer's checkpoint does not say that it was written to its end",
}
_accepted: ContextVar[frozenset[str]] = ContextVar("accepted", default=frozenset())


@contextmanager
def accept(*names: str) -> Iterator[None]:
    """Load a pool in spite of what ``names`` stand for; everything else is still refused.

    ```py
    >>> with accept("other_base"):
    ...     model = PeftModel.from_pretrained(fine_tuned_base, "pool")
    ```

    Args:
        names: ``other_base`` (the base model is not the one that the pool was made for), ``changed_tensors``,
            ``missing_tensors`` (they stay as in a new pool), ``unknown_tensors``, ``nonfinite`` (NaN or infinity),
            ``newer_format``, ``unmarked_checkpoint`` (a Trainer's checkpoint that may be incomplete).

    Raises:
        SaptError: there is no such refusal.
    """
    unknown = sorted(set(names) - set(REFUSALS))
    if unknown:
        raise SaptError(f"There is no refusal {unknown}: choose among {list(REFUSALS)}.")
    token = _accepted.set(_accepted.get() | set(names))
    try:
        yield
    finally:
        _accepted.reset(token)


def accepted(name: str) -> bool:
    """Whether the surrounding code accepts what ``name`` stands for."""
    return name in _accepted.get()
