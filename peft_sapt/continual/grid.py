"""A grid of runs, method by order by seed, each written once and never run again: it resumes wherever it was stopped.

One run is one JSON file, ``<folder>/<benchmark>/<method>.<order>.<seed>.json``, written atomically when the run ends.
Several processes may work on one folder: a run under way is held by a lock that dies with its process.
"""

from __future__ import annotations

import fcntl
import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import StreamError
from ..files import write_atomically
from .learner import Bench
from .methods import METHODS
from .metrics import average_performance, backward_transfer, forgetting_rate
from .streams import fingerprint

ORDERS: dict[str, Callable[[list[str]], list[str]]] = {"listed": list, "reversed": lambda names: names[::-1]}
PACKAGES = ("peft-sapt", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    benchmark: str
    method: str
    order: str = "listed"
    seed: int = 0

    def path(self, folder: Path) -> Path:
        return folder / self.benchmark / f"{self.method}.{self.order}.{self.seed}.json"


def runs_of(benchmark: str, methods: Iterable[str], orders: Iterable[str], seeds: Iterable[int]) -> list[Run]:
    """The cells of a grid; raises [`StreamError`] for a method or an order that does not exist."""
    for what, given, known in (("method", methods, METHODS), ("order", orders, ORDERS)):
        wrong = [name for name in given if name not in known]
        if wrong:
            raise StreamError(f"There is no {what} {wrong}: choose among {list(known)}.")
    return [Run(benchmark, m, o, s) for s in seeds for o in orders for m in methods]


def run_grid(bench: Bench, runs: list[Run], folder: Path, provenance: dict[str, Any]) -> None:
    """Do what is missing of ``runs`` under ``folder``.

    Raises:
        StreamError: a file is there already that was made with other settings or data.
    """
    for run in runs:
        path = run.path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path) as mine:
            if not mine or is_done(path, bench, run):
                continue
            write_atomically(path, text_of(do(bench, run, provenance)))
            print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)


def do(bench: Bench, run: Run, provenance: dict[str, Any]) -> dict[str, Any]:
    """The result of one run."""
    begun = time.perf_counter()
    own = of_run(bench, run)
    found = METHODS[run.method](own)
    matrix = found["matrix"]
    summary = {
        "AP": average_performance(matrix),
        "F.Ra": forgetting_rate(matrix),
        "BWT": backward_transfer(matrix),
    }
    seconds = {**own.seconds, "total": time.perf_counter() - begun}
    versions = {name: version(name) for name in PACKAGES}
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": device_name()}
    return {
        **asdict(run),
        "tasks": list(own.stream),
        "settings": settings_of(own),
        "summary": summary,
        **found,
        "provenance": {**versions, **machine, **provenance, "seconds": {k: round(v, 1) for k, v in seconds.items()}},
    }


def of_run(bench: Bench, run: Run) -> Bench:
    """``bench`` with the order and the seed of ``run``; the base model stays shared."""
    names = ORDERS[run.order](list(bench.stream))
    own = replace(
        bench,
        stream={name: bench.stream[name] for name in names},
        budget=replace(bench.budget, seed=run.seed),
        seconds={},
    )
    own.remembering = bench.remembering
    return own


def settings_of(bench: Bench) -> dict[str, Any]:
    """Everything that a result depends on beside method, order and seed."""
    budget = {k: v for k, v in asdict(bench.budget).items() if k != "seed"}
    rows = {
        name: [len(splits[s]) for s in ("train", "validation", bench.split)] for name, splits in bench.stream.items()
    }
    return {
        "budget": budget,
        "style": asdict(bench.style),
        "split": bench.split,
        "test_rows": bench.test_rows,
        "rows": dict(sorted(rows.items())),
        "data": fingerprint(bench.stream),
    }


def is_done(path: Path, bench: Bench, run: Run) -> bool:
    """Whether ``path`` holds the result of ``run``; raises [`StreamError`] if it is one of other settings or data."""
    if not path.exists():
        return False
    known, wanted = json.loads(path.read_text(encoding="utf-8"))["settings"], settings_of(of_run(bench, run))
    differing = sorted(key for key in wanted if known.get(key) != wanted[key])
    if differing:
        raise StreamError(
            f"{path} was made with other settings ({', '.join(differing)}): give another folder or benchmark name, or "
            "delete the file to run it again."
        )
    return True


def text_of(result: dict[str, Any]) -> bytes:
    """JSON with NaN as null, so that other readers than Python's take it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and value != value else value

    return (json.dumps(plain(result), indent=1) + "\n").encode()


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Whether this process may work on ``path`` now; another one that does holds a lock until it ends or dies."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
