"""The transfer experiment: every arm on the same rows and steps, paired intervals, resumable."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import transfer as subject
from transfer import FewShot, gain_over_alone, interval, transfer

from helpers.bench import tiny_bench
from helpers.paths import EXAMPLES
from peft_sapt.errors import StreamError

ARMS = ["ridge", "ridge-warm", "learned", "learned-warm"]


def test_all_arms_see_the_same_rows_and_steps(tmp_path, monkeypatch) -> None:
    bench, seen, train = tiny_bench(tmp_path), [], subject.train

    def spying(bench, model, name, callbacks, **settings):
        trainer = train(bench, model, name, callbacks, **settings)
        seen.append((name, [row["input"] for row in bench.stream[name]["train"]], trainer.state.global_step))
        return trainer

    monkeypatch.setattr(subject, "train", spying)
    found = transfer(bench, "first", "second", FewShot([4, 8], steps=6, old_rows=8), ARMS)
    assert [name for name, *_ in seen] == ["first"] * 2 + ["second"] * 2 * (1 + len(ARMS)), "old tasks learned once"
    small, large = seen[2 : 3 + len(ARMS)], seen[3 + len(ARMS) :]
    assert all(entry == small[0] for entry in small) and all(entry == large[0] for entry in large)
    assert len(small[0][1]) == 4 and set(small[0][1]) <= set(large[0][1]) and small[0][2] == large[0][2] == 6
    assert set(found["scores"]) == {"4", "8"}
    for scores in found["scores"].values():
        assert set(scores) == {"alone", *ARMS}
        assert all(len(scores[arm]["weights"]) == 2 and 0 <= scores[arm]["test"] <= 100 for arm in ARMS)


def test_too_many_rows_are_refused(tmp_path) -> None:
    with pytest.raises(StreamError, match="'second' has 8 training rows, 9"):
        transfer(tiny_bench(tmp_path), "first", "second", FewShot([9], steps=6, old_rows=8), ARMS)


def test_intervals_are_students_and_paired() -> None:
    values = [3.0, 5.0, 4.0, 8.0]
    mean, low, high = interval(values)
    half = 3.182446 * np.std(values, ddof=1) / 2  # t(0.975, 3 degrees of freedom)
    assert (mean, low, high) == pytest.approx((5.0, 5.0 - half, 5.0 + half), rel=1e-3)
    rows = [{"scores": {"4": {"alone": {"test": a}, "ridge": {"test": a + 2.0}}}} for a in (10.0, 50.0, 90.0)]
    assert gain_over_alone(rows, "ridge", 4) == (2.0, 2.0, 2.0), "what seeds have in common drops out"


@pytest.mark.slow
def test_the_example_resumes(tmp_path) -> None:
    names = ("old", "new")
    for task in names:
        for split in ("train", "validation", "test"):
            rows = [{"instruction": "", "input": f"{task} {i}", "output": ["yes"]} for i in range(12)]
            (tmp_path / f"{task}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, str(EXAMPLES / "transfer.py"), "--tasks-dir", str(tmp_path), "--pairs", "old+new",
        "--counts", "8", "--seeds", "0,1", "--arms", "ridge-warm", "--steps", "2", "--old-rows", "8", "--layers", "1",
        "--max-tokens", "32", "--max-answer", "2", "--test-rows", "4", "--results", str(tmp_path / "out"),
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/transfer").glob("*.json")}
    assert len(files) == 2 and "old+new | 8 | ridge-warm | 2 |" in first
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {p: p.stat().st_mtime_ns for p in files} == files and again.splitlines()[-1] == first.splitlines()[-1]
    other = subprocess.run([*command, "--lr", "0.1"], capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "other settings" in other.stderr
