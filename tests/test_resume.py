"""A grid that is killed again and again ends with the results of one that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import SMALL, model, tasks

__all__ = ["model", "tasks"]
METHODS = "sequential,replay,o-lora,multi-task,epi,l2p,sapt-ridge,sapt-real-rows"
RUNS = 2 * (8 + 2)  # seeds by methods, and the two that FWT needs
KILLS = 10


def results(folder: Path) -> dict:
    found = json.loads((folder / "tiny" / "results.json").read_text())
    assert len(found.pop("provenance")) == RUNS == len(found["runs"])
    return found


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_the_same(model, tasks, tmp_path) -> None:
    source = ["--model", str(model), "--tasks-dir", str(tasks), *SMALL, "--no-report"]
    grid = ["bench", "--methods", METHODS, "--seeds", "0,1", "--name", "tiny", *source]
    code = "from peft_sapt.cli import main; main()"
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", code, *grid, "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    killed, rng, kills = tmp_path / "killed", random.Random(0), 0
    while kills < KILLS:
        for lock in killed.rglob(".*.lock"):
            lock.unlink()  # so that a new one says that a run is under way
        process = start(killed)
        while process.poll() is None and not list(killed.rglob(".*.lock")):
            time.sleep(0.01)
        assert process.poll() is None, f"all was done after {kills} kills: the grid is too small for this test"
        time.sleep(rng.uniform(0, 1.0))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    before = {p.name: p.read_bytes() for p in (killed / "tiny").glob("*.json")}
    assert len(before) < RUNS and "results.json" not in before
    assert start(killed).wait() == 0 and whole.wait() == 0, whole.stderr.read()[-2000:]
    assert results(killed) == results(tmp_path / "whole")
    for name, content in before.items():
        assert (killed / "tiny" / name).read_bytes() == content, "what was there was not run again"
