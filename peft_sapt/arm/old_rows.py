"""Whether a task that is opened again gets its old rows again, without keeping them: by digests of some prompts."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from ..errors import ReflectionError
from ..pool import lifecycle
from ..pool.view import Pool
from .processes import broadcast_from_rank0

KEPT, DIGITS = 20, 8  # digests of a task, and hexadecimal digits of each


def digests(prompts: list[list[int]]) -> list[str]:
    """A short digest of each prompt (token ids), sorted, without repetitions."""
    return sorted({hashlib.sha256(np.array(p, dtype="<i8").tobytes()).hexdigest()[:DIGITS] for p in prompts})


def note_prompts(pool: Pool, name: str, prompts: list[list[int]]) -> None:
    """Record the smallest digests of a task's prompts: of any further set of rows that holds the old ones, these are
    among the digests."""
    if prompts:
        lifecycle.record_task(pool, name, prompts=" ".join(digests(prompts)[:KEPT]))


def refuse_new_rows_alone(pool: Pool, prompts: list[list[int]], rows: int) -> None:
    """Raises [`ReflectionError`] if the current task was committed before and none of its old prompts comes again.

    Nothing is said where only some of the ``rows`` were read, or no prompt was recorded.
    """
    name = pool.current_task
    known = str(pool.config.records.get(name, {}).get("prompts", "")).split()
    gone = bool(known and prompts) and len(prompts) == rows and not set(known) & set(digests(prompts))
    flag = torch.tensor([float(gone)], device=pool.memory.device)
    broadcast_from_rank0([flag])
    if bool(flag):
        raise ReflectionError(
            f"Task {name!r} was opened again, and none of {len(known)} prompts that it was trained on is among the "
            f"{rows} of now: its block would forget them. Nothing was trained. Give it old and new rows together; or "
            f"call model.continue_task({name!r}), which closes it as it was and gives new rows a block of their own, "
            "which starts as a copy; or let it forget: reopen_task(forget=True)."
        )
