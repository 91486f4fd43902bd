"""Campaigns: tests that run for many minutes, on demand, and keep what they counted in tests/campaigns/NAME.json.

    python -m pytest -m campaign tests               # all of them; or a file of PLACES, for one

A file is written when the whole campaign has passed, with the commit it ran on. tests/test_campaigns.py holds the
files against what is promised.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from helpers.paths import ROOT, TESTS

FOLDER = TESTS / "campaigns"
PARSERS = ["manifest", "config", "weights header", "JSONL stream", "checkpoint marker", "generator", "results",
           "LoRA folder", "soft prompt", "official pickle"]  # fmt: skip
PROMISED: dict[str, dict[str, int]] = {
    "soak": {"tasks, attention": 200, "tasks, ridge": 200, "tasks, with a leak": 100},
    "kills": {"save_pool": 50, "save_pretrained": 50, "training": 2, "reflecting": 2, "evaluating": 2},
    "fuzzing": {f"cases, {parser}": 100_000 for parser in PARSERS},
    "walks": {"walks": 500},
    "habits": {"walks": 400},
    "notebooks": {"quickstart.ipynb": 1, "heatmaps.ipynb": 1},
    "resume": {"kills": 10, "runs": 20},
}
PLACES = {
    "soak": "tests/pool/test_soak.py", "kills": "tests/pool/test_kills.py", "walks": "tests/pool/test_walks.py",
    "habits": "tests/pool/test_habits.py",
    "fuzzing": "tests/storage/attacks/test_fuzz.py", "notebooks": "tests/examples/test_notebooks.py",
    "resume": "tests/continual/test_resume.py",
}  # fmt: skip


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def lacking(name: str, counts: dict[str, int]) -> list[str]:
    """What was promised of a campaign and was not reached."""
    return [
        f"{name}: {counts.get(what, 0)} of {promised} {what}"
        for what, promised in PROMISED[name].items()
        if counts.get(what, 0) < promised
    ]


def commit() -> str:
    """The commit of the working tree, marked as dirty if anything but a campaign's file differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", ".", f":(exclude){FOLDER.relative_to(ROOT)}")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


@contextmanager
def campaign(name: str) -> Iterator[Counter[str]]:
    """Within, count what runs; at the end, if nothing failed and all that is promised ran, it is written down."""
    counts: Counter[str] = Counter()
    at, started, begun = commit(), datetime.now(UTC), time.perf_counter()
    yield counts
    assert not lacking(name, counts), lacking(name, counts)
    libraries = ("torch", "transformers", "peft", "safetensors", "peft-sapt")
    found: dict[str, Any] = {
        "campaign": name,
        "commit": at,
        "date": started.isoformat(timespec="seconds"),
        "counts": dict(counts),
        "seconds": round(time.perf_counter() - begun),
        "versions": {"python": platform.python_version(), **{library: version(library) for library in libraries}},
    }
    FOLDER.mkdir(exist_ok=True)
    file_of(name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
