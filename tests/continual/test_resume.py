"""A grid that is killed again and again ends with the results of one that was left alone."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.bench import SMALL, save_model, save_tasks
from helpers.campaigns import campaign
from helpers.paths import environment

METHODS = "sequential,replay,o-lora,multi-task,epi,l2p,sapt-ridge,sapt-real-rows"
FEW = "sequential,sapt-ridge"


def results(folder: Path) -> dict:
    found = json.loads((folder / "tiny" / "results.json").read_text())
    assert len(found.pop("provenance")) == len(found["runs"])
    return found


def killed_and_whole(folder: Path, source: list[str], methods: str, seeds: str, kills: int) -> int:
    """Kill a grid at random moments and let it end; the number of its runs, all equal to those of one left alone."""
    grid = ["bench", "--methods", methods, "--seeds", seeds, "--name", "tiny", *source, "--no-report"]
    code, env = "from peft_sapt.cli import main; main()", environment(TQDM_DISABLE="1", OMP_NUM_THREADS="1")

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *grid, "--out", str(out)]
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole, killed, rng = start(folder / "whole"), folder / "killed", random.Random(0)
    for number in range(kills):
        for lock in killed.rglob(".*.lock"):
            lock.unlink()  # so that a new one says that a run is under way
        process = start(killed)
        while process.poll() is None and not list(killed.rglob(".*.lock")):
            time.sleep(0.01)
        assert process.poll() is None, f"all was done after {number} kills: the grid is too small for this test"
        time.sleep(rng.uniform(0, 1.0))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {p.name: p.read_bytes() for p in (killed / "tiny").glob("*.json")}
    assert "results.json" not in before
    assert start(killed).wait() == 0 and whole.wait() == 0, whole.stderr.read()[-2000:]
    found = results(killed)
    assert found == results(folder / "whole") and len(before) < len(found["runs"])
    for name, content in before.items():
        assert (killed / "tiny" / name).read_bytes() == content, "what was there was not run again"
    return len(found["runs"])


@pytest.fixture
def source(tmp_path) -> list[str]:
    """Options that name the tiny model and its tasks."""
    (tmp_path / "base").mkdir()
    (tmp_path / "tasks").mkdir()
    return ["--model", str(save_model(tmp_path / "base")), "--tasks-dir", str(save_tasks(tmp_path / "tasks")), *SMALL]


@pytest.mark.slow
def test_killed_twice_it_ends_the_same(source, tmp_path) -> None:
    assert killed_and_whole(tmp_path, source, FEW, "0", kills=2) == 3  # the methods, and one that FWT needs


@pytest.mark.campaign
def test_killed_at_ten_random_moments_it_ends_the_same(source, tmp_path) -> None:
    with campaign("resume") as counts:
        counts["runs"] += killed_and_whole(tmp_path, source, METHODS, "0,1", kills=10)
        counts["kills"] += 10
