"""Whether a task that is opened again gets its old rows again, without keeping them: by digests of some prompts."""

from __future__ import annotations

import hashlib

import numpy as np

from ..errors import ReflectionError
from ..pool import lifecycle
from ..pool.view import Pool
from .processes import everywhere, gathered

KEPT, DIGITS = 100, 8  # digests of a task, and hexadecimal digits of each


def digests(prompts: list[list[int]]) -> list[str]:
    """A short digest of each prompt (token ids), sorted, without repetitions."""
    return sorted({hashlib.sha256(np.array(p, dtype="<i8").tobytes()).hexdigest()[:DIGITS] for p in prompts})


def note_prompts(pool: Pool, name: str, prompts: list[list[int]]) -> None:
    """Record the smallest digests of a task's prompts, of all processes: of any further set of rows that holds the old
    ones, these are among the digests, and of one that holds a twentieth of them, some are (99 % sure)."""
    found = sorted({digest for part in gathered(digests(prompts)[:KEPT]) for digest in part})[:KEPT]
    if found:
        lifecycle.record_task(pool, name, prompts=" ".join(found))


def refuse_new_rows_alone(pool: Pool, prompts: list[list[int]], rows: int) -> None:
    """Raises [`ReflectionError`] if the current task was committed before and none of its old prompts comes again, in
    no process.

    Nothing is said where only some of the ``rows`` were read, or no prompt was recorded.
    """
    name = pool.current_task
    known = str(pool.config.records.get(name, {}).get("prompts", "")).split()
    gone = bool(known and prompts) and len(prompts) == rows and not set(known) & set(digests(prompts))
    if everywhere(gone, pool.memory.device):
        way = f"call model.continue_task({name!r}), which closes it as it was and gives new rows a block of their own"
        if pool.adapter not in pool.memory.undone:
            way = f"load the pool as it was before reopen_task, and call model.continue_task({name!r}) for new rows"
        raise ReflectionError(
            f"Task {name!r} was opened again, and none of {len(known)} prompts that it was trained on is among the "
            f"{rows} of now: its block would forget them. Nothing was trained. Give it old and new rows together, "
            f"written as before; or {way}; or, where they are the old ones in another template or with another "
            "tokenizer, or may be forgotten, call model.reopen_task(forget=True)."
        )
