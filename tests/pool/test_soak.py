"""200 tasks added, saved, loaded and pruned in one process: memory, time and old answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import soak_worker
from helpers.campaigns import campaign
from helpers.paths import environment

TASKS = 200
SLACK = 8 * 2**20  # bytes; one tiny model that is not let go in each round is 90 MiB over a run


def measured(router: str, tasks: int, folder: Path, *leak: str) -> dict:
    """What a process of its own found; see soak_worker.py."""
    command = [sys.executable, "-m", "helpers.soak_worker", router, str(tasks), str(folder), *leak]
    # one arena and no growing thresholds: freed memory can be given back, so that what stays is what is held
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def growth(memory: list[list[int]]) -> tuple[float, int]:
    """Bytes gained in the second half of a run, by the slope of a line through its readings; and the pool's own."""
    half = np.array(memory[len(memory) // 2 :], dtype=float)  # [readings, (round, bytes held, bytes of the file)]
    slope = np.polyfit(half[:, 0], half[:, 1], 1)[0]
    return float(slope * (half[-1, 0] - half[0, 0])), int(half[-1, 2] - half[0, 2])


def check_tasks(found: dict, tasks: int) -> None:
    """Nothing of an old task has changed, and pruning leaves the last one as it was."""
    assert found["tasks"] == [f"t{i}" for i in range(tasks)]
    assert found["changed"] == [], "an old task's bytes have changed"
    assert found["drift"] <= 2e-6, "an old task answers differently"  # a longer sum is added up in another order
    assert found["left"] == [f"t{tasks - 1}"] and not found["left_changed"], "pruning changed the task that stayed"
    assert found["left_drift"] <= 2e-6
    assert found["pruned_size"] < 1.6 * found["sizes"][0] + 200_000


@pytest.mark.parametrize("router", ["attention", "ridge"])
def test_a_dozen_tasks(router: str, tmp_path) -> None:
    check_tasks(soak_worker.main(router, 12, tmp_path, leak=False), 12)


def check_growth(found: dict, router: str) -> None:
    """Memory grows with the pool and no faster; so does the time of a task."""
    grown, own = growth(found["memory"])
    early, late = float(np.median(found["times"][40:80])), float(np.median(found["times"][-40:]))
    print(
        f"{router}: {TASKS} tasks, {found['sizes'][-1] / 2**20:.1f} MiB on disk, memory {grown / 2**20:+.1f} MiB for "
        f"+{own / 2**20:.1f} MiB of pool over the second half, {early * 1e3:.0f} ms per task at 40-80, "
        f"{late * 1e3:.0f} ms at 160-200, drift {found['drift']:.1e}"
    )
    assert grown <= 3 * own + SLACK, "memory grows beyond the pool's own bytes"
    assert late <= early * (180 / 60) * 1.5, "time per task grows faster than the pool"


@pytest.mark.campaign
def test_two_hundred_tasks_and_a_leak_that_is_noticed(tmp_path) -> None:
    with campaign("soak") as counts:
        for router in ("attention", "ridge"):
            found = measured(router, TASKS, tmp_path / router)
            check_tasks(found, TASKS)
            check_growth(found, router)
            counts[f"tasks, {router}"] += len(found["tasks"])
        grown, own = growth(measured("attention", 100, tmp_path / "leak", "leak")["memory"])
        assert grown > 3 * own + SLACK, f"a model kept in every round shows as {grown} bytes"
        counts["tasks, with a leak"] += 100
