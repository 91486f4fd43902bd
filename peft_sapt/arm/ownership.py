"""Whose a text is: what a callback has to say of its pools, told apart by the pools themselves.

One callback may serve several models, one after another or in turns, with tasks of the same name. Texts belong to the
replay rows that were made from them, and a generator to the block it was fitted beside; copies and reloads of a pool
have the same rows and blocks, other pools never.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor

from ..pool.view import Pool
from ..routing.memory import TaskMemory
from ..storage.manifest import digest


@dataclass
class Told:
    """What a callback has to say of the tasks of one pool, by their names."""

    reports: dict[str, dict[str, object]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)  # [n, d], those that the texts of a task stand for


@dataclass
class Opened:
    """The task whose prompts a callback holds."""

    memory: TaskMemory
    adapter: str
    task: str

    @classmethod
    def of(cls, pool: Pool) -> Opened:
        return cls(pool.memory, pool.adapter, pool.current_task)

    def is_of(self, pool: Pool) -> bool:
        """Whether it is the current task of ``pool``."""
        return self.memory is pool.memory and (self.adapter, self.task) == (pool.adapter, pool.current_task)


class Ledger:
    """What a callback has to say, by pool."""

    def __init__(self) -> None:
        self.entries: list[tuple[Callable[[], TaskMemory | None], str, Told]] = []
        self.last = Told()

    def __getstate__(self) -> dict[str, object]:
        """Without references to models: in a copy or a pickle, pools are known by their rows."""
        return {"entries": [(_nobody, adapter, told) for _, adapter, told in self.entries], "last": self.last}

    def of(self, pool: Pool) -> Told:
        """What there is to say of ``pool``, which becomes the last one; of a copy or reload, what its rows show."""
        for memory, adapter, told in self.entries:
            if memory() is pool.memory and adapter == pool.adapter:
                self.last = told
                return told
        self.last = self._recognised(pool)
        self.entries.append((ref(pool.memory), pool.adapter, self.last))
        return self.last

    def texts_for(self, rows: dict[str, Tensor]) -> dict[str, list[str]]:
        """The texts that stand for replay ``rows`` [n, d] of the tasks of some pool."""
        told = [told for _, _, told in self.entries]
        return {name: t.texts[name] for t in told for name in t.texts if same_rows(t.rows[name], rows.get(name))}

    def _recognised(self, pool: Pool) -> Told:
        found, rows = Told(), dict(zip(pool.tasks, pool.memory.replay(pool.adapter), strict=True))
        for _, _, told in self.entries:
            for name in told.texts:
                if same_rows(told.rows[name], rows.get(name)):
                    found.texts[name], found.rows[name] = told.texts[name], told.rows[name]
                    found.reports[name] = told.reports[name]
        return found


def _nobody() -> None:
    return None


def same_rows(known: Tensor, rows: Tensor | None) -> bool:
    """Whether two stacks of replay rows [n, d] are the same, perhaps in another dtype."""
    if rows is None or known.shape != rows.shape or not len(rows):
        return False
    return torch.allclose(known.cpu().float(), rows.cpu().float(), rtol=2.0**-7, atol=1e-6)


def block_digest(pool: Pool, task: str) -> str:
    """What tells the block of a task from all others."""
    state = pool.task_state(task)
    own: Iterable[str] = sorted(key for key in state if not key.startswith(f"{pool.router.module_name}."))
    return hashlib.sha256("".join(digest(state[key].float()) for key in own).encode()).hexdigest()[:32]
