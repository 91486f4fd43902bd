"""The grid of runs: resumable at any point to the same result, never mixing settings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from helpers.bench import tiny_bench
from peft_sapt.continual.grid import Run, differences, held, is_done, run_grid, runs_of, settings_of
from peft_sapt.errors import StreamError

METHODS = ["sequential", "per-task", "sapt-ridge", "sapt-real-rows"]


def test_a_grid_writes_each_run_once(tmp_path) -> None:
    bench = tiny_bench(tmp_path)
    runs = [*runs_of("tiny", METHODS, ["listed"], [0]), *runs_of("tiny", ["sapt-ridge"], ["reversed"], [0])]
    run_grid(bench, runs, tmp_path / "out", {"model": "tiny"})
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")}
    assert len(first) == len(runs) == len(METHODS) + 1
    run_grid(bench, runs, tmp_path / "out", {})
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.json")} == first
    assert all(path.suffix == ".lock" for path in (tmp_path / "out").rglob(".*"))
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
    assert is_done(runs[0].path(tmp_path / "out"), bench, runs[0])
    with pytest.raises(StreamError, match=r"other settings \(seed\)"):
        is_done(runs[0].path(tmp_path / "out"), bench, replace(runs[0], seed=runs[0].seed + 1))
    with pytest.raises(StreamError, match=r"other settings \(method\)"):
        is_done(runs[0].path(tmp_path / "out"), bench, replace(runs[0], method="sapt"))
    other = tiny_bench(tmp_path)
    with torch.no_grad():
        for layer in other.base.model.layers:
            layer.mlp.down_proj.weight += 0.1
    with pytest.raises(StreamError, match=r"other settings \(numbers\)"):
        is_done(runs[0].path(tmp_path / "out"), other, runs[0])
    other.base = tiny_bench(tmp_path).base.bfloat16()
    with pytest.raises(StreamError, match=r"settings \(dtype"):
        is_done(runs[0].path(tmp_path / "out"), other, runs[0])
    wanted = settings_of(bench)
    assert differences({k: v for k, v in wanted.items() if k not in ("dtype", "numbers")}, wanted) == [], (
        "an older one"
    )
    assert differences(settings_of(other), wanted) == ["dtype", "model", "numbers"], "nor the other way round"
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
    assert [path.name for path in tmp_path.iterdir()] == [".run.json.lock"]
    with held(path) as mine:
        assert mine
