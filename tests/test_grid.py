"""The grid of runs: resumable at any point to the same result, never mixing settings."""

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
import torch
from test_arm import tokenizer as make_tokenizer
from tiny import tiny_llama

from peft_sapt.continual.grid import Run, held, is_done, run_grid, runs_of
from peft_sapt.continual.learner import Bench, Budget
from peft_sapt.continual.prompts import PromptStyle
from peft_sapt.continual.scoring import exact_match
from peft_sapt.errors import StreamError

ROOT = Path(__file__).parents[1]
METHODS = ["sequential", "per-task", "sapt-ridge", "sapt-real-rows"]


def tiny_bench(work: Path, rows: int = 8) -> Bench:
    """Two tasks of four words each, whose answers are two of them, on a tiny random model."""
    torch.manual_seed(0)
    rng = random.Random(0)
    words = {"first": ["w10", "w11", "w12", "w13"], "second": ["w20", "w21", "w22", "w23"]}

    def row(own: list[str]) -> dict[str, object]:
        picked = rng.choices(own, k=5)
        return {"instruction": "", "input": " ".join(picked), "output": [own[picked[0] in own[:2]]]}

    splits = ("train", "validation", "test")
    stream = {task: {split: [row(own) for _ in range(rows)] for split in splits} for task, own in words.items()}
    budget = Budget(epochs=1.0, batch_size=4, layers=1, align_steps=3, max_answer=2)
    style = PromptStyle(head="", tail="", definitions=False, max_tokens=8, min_input=4)
    return Bench(tiny_llama(), make_tokenizer(), stream, style, exact_match, budget, work)


def without_provenance(folder: Path) -> dict[str, dict]:
    found = {p.relative_to(folder).as_posix(): json.loads(p.read_text()) for p in folder.rglob("*.json")}
    for result in found.values():
        del result["provenance"]
    return found


def test_a_grid_writes_each_run_once(tmp_path) -> None:
    bench, runs = tiny_bench(tmp_path), runs_of("tiny", METHODS, ["listed", "reversed"], [0])
    run_grid(bench, runs, tmp_path / "out", {"model": "tiny"})
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")}
    assert len(first) == 2 * len(METHODS)
    run_grid(bench, runs, tmp_path / "out", {})
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")} == first
    assert not list((tmp_path / "out").rglob(".*"))
    result = json.loads(Run("tiny", "sapt-ridge", "reversed").path(tmp_path / "out").read_text())
    assert result["tasks"] == ["second", "first"] and result["matrix"][0][1] is None
    assert set(result["summary"]) == {"AP", "F.Ra", "BWT"} and result["provenance"]["model"] == "tiny"
    assert len(result["train_weights"]) == len(result["routing"]) == 2
    assert result["routing_by_stage"][-1] == result["routing"] and result["routing_by_stage"][0][1] is None
    own = [result["mean_weights"][i][i] for i in range(2)]
    assert result["own_weight_by_stage"][-1] == pytest.approx(own)
    replayed = json.loads(Run("tiny", "sapt-real-rows").path(tmp_path / "out").read_text())["pseudo_samples"]
    assert all(report["real_rows"] and 0 <= report["routed_to_own"] <= 100 for report in replayed.values())


def test_other_settings_are_not_mixed_in(tmp_path) -> None:
    bench, runs = tiny_bench(tmp_path), runs_of("tiny", ["sequential"], ["listed"], [0])
    run_grid(bench, runs, tmp_path / "out", {})
    assert is_done(runs[0].path(tmp_path / "out"), bench)
    bench.budget.lr = 1.0
    with pytest.raises(StreamError, match=r"sequential.listed.0.json was made with other settings \(budget\)"):
        run_grid(bench, runs, tmp_path / "out", {})
    with pytest.raises(StreamError, match=r"rows, data|data, rows"):
        run_grid(tiny_bench(tmp_path, rows=9), runs, tmp_path / "out", {})


def test_unknown_names_are_listed() -> None:
    with pytest.raises(StreamError, match=r"no method \['ewc'\].*sapt-ridge"):
        runs_of("tiny", ["ewc"], ["listed"], [0])
    with pytest.raises(StreamError, match=r"no order \['random'\].*reversed"):
        runs_of("tiny", ["sapt"], ["random"], [0])


def test_a_run_under_way_is_left_to_its_process(tmp_path) -> None:
    path = tmp_path / "run.json"
    with held(path) as mine:
        assert mine
        with held(path) as also_mine:
            assert not also_mine
    assert not list(tmp_path.iterdir())
    with held(path) as mine:
        assert mine


WORKER = """
import sys; sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from pathlib import Path
from test_grid import METHODS, tiny_bench
from peft_sapt.continual.grid import run_grid, runs_of
out = Path(sys.argv[1])
run_grid(tiny_bench(out.parent), runs_of("tiny", METHODS, ["listed"], [0]), out, {{}})
"""


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_the_same(tmp_path) -> None:
    script = WORKER.format(path=[str(ROOT), str(ROOT / "tests")])

    def start(out: Path) -> subprocess.Popen:
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        return subprocess.Popen([sys.executable, "-c", script, str(out)], env=environment, stdout=subprocess.DEVNULL)

    begun = time.perf_counter()
    assert start(tmp_path / "whole").wait() == 0
    whole, rng, kills = time.perf_counter() - begun, random.Random(1), 0
    for _ in range(10):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(0.4, 1.0) * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    assert kills >= 1
    assert without_provenance(tmp_path / "killed") == without_provenance(tmp_path / "whole")
