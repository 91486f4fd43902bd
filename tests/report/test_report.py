"""Reports say what the raw results say: numbers recomputed, formats parsed by others, pictures drawn at 15 tasks."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_sapt.continual.grid import Run, orders_of, runs_of, text_of, with_single_scores
from peft_sapt.continual.labels import LABELS, PROMPTS, alone_of
from peft_sapt.continual.methods import METHODS
from peft_sapt.continual.metrics import forgetting_of
from peft_sapt.continual.results import labelled, load_runs, metrics_of, spread_of, with_nan, write_results
from peft_sapt.errors import StreamError
from peft_sapt.report.tables import csv, latex, markdown, methods_table, numbers_table, short, tasks_table
from peft_sapt.report.write import write_report

NAMES = [f"task{i:03d}_a_long_name_{i}" for i in range(1, 16)]


def result_of(method: str, order: str = "listed", seed: int = 0, names: list[str] = NAMES) -> dict:
    """A made-up result with every part that reports read; the last task answers in free text."""
    rng = np.random.default_rng([seed, *map(ord, method)])
    count = len(names)
    matrix = np.where(np.tri(count) > 0, rng.uniform(0, 100, (count, count)), np.nan)
    constrained = np.where(np.arange(count) == count - 1, np.nan, matrix / 2)
    weights = rng.dirichlet(np.ones(count), count)
    found = {
        "benchmark": "made-up", "method": method, "order": order, "seed": seed, "tasks": names,
        "settings": {
            "budget": {"lr": 0.1}, "style": {"head": "{definition}\n"}, "split": "test", "test_rows": None,
            "rows": {name: [9, 5, 7] for name in names}, "data": "0" * 64, "metric": "exact_match", "model": "tiny",
        },
        "matrix": matrix.tolist(), "constrained": constrained.tolist(),
        "validation": rng.uniform(0, 100, count).tolist(),
        "stored_bytes": np.cumsum(rng.integers(1000, 9000, count)).tolist(),
        "provenance": {"commit": "c" * 40, "device": "cpu", "torch": "2", "seconds": {"total": 1.0 + seed}},
    }  # fmt: skip
    if method == "per-task":
        found["single"] = [matrix[-1][i] for i in range(count)]
    if method.startswith("sapt"):
        found |= {"routing": [90.0] * count, "mean_weights": weights.tolist(), "train_weights": weights.tolist()}
    return found


def write_runs(folder: Path, runs: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        (folder / f"{run['method']}.{run['order']}.{run['seed']}.json").write_bytes(text_of(run))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    methods = [result_of(m, seed=s) for m in ("per-task", "sequential", "sapt", "sapt-ridge") for s in (0, 1)]
    return write_runs(tmp_path / "runs", [*methods, result_of("sapt", "reversed", names=NAMES[::-1])])


def test_every_method_has_a_label_and_a_bound_for_fwt() -> None:
    assert set(LABELS) == set(METHODS) and set(METHODS) > PROMPTS
    assert {alone_of(method) for method in METHODS} == {"per-task", "prompt-per-task"}


def test_numbers_are_those_of_the_matrices(folder) -> None:
    runs = load_runs(folder)
    table = pd.read_csv(io.StringIO(csv(*numbers_table(runs)))).set_index(["method", "order", "metric"])
    for method in ("sequential", "sapt"):
        own = [r for r in runs if r["method"] == method and r["order"] == "listed"]
        matrices = [np.array(r["matrix"]) for r in own]
        single = [np.array(r["single"]) for r in runs if r["method"] == "per-task"]
        expected = {
            "AP": [m[-1].mean() for m in matrices],
            "F.Ra": [np.mean([np.nanmax(m[:-1, j]) - m[-1, j] for j in range(14)]) for m in matrices],
            "BWT": [(m[-1] - m.diagonal()).sum() / 15 for m in matrices],
            "FWT": [(m.diagonal() - s).mean() for m, s in zip(matrices, single, strict=True)],
            "AP constrained": [m[-1, :-1].mean() / 2 for m in matrices],
        }
        for metric, values in expected.items():
            line = table.loc[(method, "listed", metric)]
            assert line["mean"] == pytest.approx(np.mean(values))
            assert line["std"] == pytest.approx(np.std(values, ddof=1))
            assert line["min"] == pytest.approx(min(values)) and line["max"] == pytest.approx(max(values))
            assert line["seeds"] == 2
    assert ("per-task", "listed", "F.Ra") not in table.index, "a bound cannot forget"
    [backwards] = [r for r in runs if r["order"] == "reversed"]
    expected = np.diagonal(backwards["matrix"]).mean() - single[0].mean()
    found = table.loc[("sapt", "reversed", "FWT")]["mean"]
    assert found == pytest.approx(expected), "single scores are found by task, whatever the order"


def test_formats_hold_the_same_cells(folder) -> None:
    head, rows = methods_table(load_runs(folder))
    parsed = pd.read_csv(io.StringIO(csv(head, rows)), dtype=str, keep_default_na=False)
    assert [parsed.columns.tolist(), *parsed.values.tolist()] == [head, *rows]
    lines = [line.strip("| ").split(" | ") for line in markdown(head, rows).splitlines()]
    assert [lines[0], *lines[2:]] == [head, *rows]
    text = latex(head, rows)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + len(rows) and all(line.count(" & ") == len(head) - 1 for line in body)
    assert r"routing \%" in text and r"$\pm$" in text and "±" not in text and "`" not in text
    assert r"a\_b" in latex(["name"], [["a_b"]])


def test_columns_without_a_value_are_left_out(tmp_path) -> None:
    head, _ = methods_table(load_runs(write_runs(tmp_path, [result_of("sequential")])))
    assert "routing %" not in head and "FWT" not in head and "AP" in head


def test_the_report_is_whole(folder, tmp_path) -> None:
    path = write_report(folder, tmp_path / "report")
    text = path.read_text()
    for picture in re.findall(r"\]\((.+\.png)\)", text):
        assert (path.parent / picture).stat().st_size > 10_000
    assert {p.name for p in path.parent.glob("*.png")} == set(re.findall(r"\]\((.+\.png)\)", text))
    assert text.count("![attention") == 2 and "![bytes stored" in text and "c" * 40 in text
    assert [short(name) for name in NAMES][:2] == ["001", "002"] and "| 001 | 002 |" in text
    again = write_report(folder, tmp_path / "report")
    assert again.read_text() == text


def test_tasks_of_free_text_have_no_constrained_score() -> None:
    run = result_of("sapt")
    kept = labelled(run)
    assert kept.shape == (15, 15) and np.isnan(kept[:, 14]).all() and not np.isnan(np.tril(kept[:14, :14])).any()
    assert np.allclose(kept[-1, :14], np.array(run["matrix"])[-1, :14] / 2), "the last row is that of the stream's end"
    head, rows = tasks_table([run], "constrained")
    assert rows[0][-1] == "-" and len(head) == 16


def test_constrained_forgetting_counts_every_stage_and_every_labelled_task() -> None:
    """By hand: the first task is best after the second, and the last labelled task is not the stream's last."""
    nan = float("nan")
    run = {"constrained": [[90, nan, nan], [95, 80, nan], [50, 20, nan]]}
    assert forgetting_of(labelled(run)) == ((95 - 50) + (80 - 20)) / 2
    assert labelled({"constrained": [[nan, nan], [nan, nan]]}) is None
    assert forgetting_of(np.array([[nan, nan], [nan, 70.0]])) == 0.0, "the last task cannot have been forgotten"


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=6), st.integers(0, 3))
def test_spreads(values, missing) -> None:
    found = spread_of([*values, *[float("nan")] * missing])
    assert found["min"] == min(values) and found["max"] == max(values)
    assert found["min"] - 1e-9 <= found["mean"] <= found["max"] + 1e-9
    assert found["std"] != found["std"] if len(values) == 1 else found["std"] == pytest.approx(np.std(values, ddof=1))
    assert spread_of([float("nan")] * missing) is None


def test_results_json_says_all_but_the_bulk(tmp_path) -> None:
    runs = runs_of("made-up", ["sequential", "sapt"], ["listed"], [0])
    assert write_results(tmp_path, runs) is None, "nothing is there yet"
    write_runs(tmp_path / "made-up", [{**result_of(r.method), "prompt_weights": {}} for r in runs])
    path = write_results(tmp_path, runs)
    found = with_nan(json.loads(path.read_text()))
    assert [r["method"] for r in found["runs"]] == ["sequential", "sapt"] and len(found["provenance"]) == 2
    assert all("provenance" not in r and "prompt_weights" not in r for r in found["runs"])
    assert metrics_of(found["runs"][1], [])["AP"] == found["summary"][1]["AP"]["mean"]
    assert [r["method"] for r in load_runs(path.parent)] == ["sequential", "sapt"], "results.json is no run"


def test_broken_results_are_named(tmp_path) -> None:
    folder = write_runs(tmp_path, [result_of("sapt")])
    for text in ("{", "[]", '{"method": "sapt"}', json.dumps({**result_of("sapt"), "matrix": [[1]]})):
        (folder / "broken.json").write_text(text)
        with pytest.raises(StreamError, match=r"broken\.json is not the result of a run"):
            load_runs(folder)


def test_single_scores_are_measured_once_for_each_seed() -> None:
    orders = {**orders_of(["a", "b"]), "part": ["a"]}
    runs = runs_of("x", ["sapt", "l2p", "per-task"], ["part", "listed", "reversed"], [0, 1], orders)
    found = with_single_scores(runs, orders)
    assert set(runs) <= set(found) and len(found) == len(set(found))
    extra = [run for run in found if run not in runs]
    assert {(r.method, r.order) for r in extra} == {("prompt-per-task", "part"), ("prompt-per-task", "listed")}
    assert found.index(Run("x", "per-task", "part", 0)) < found.index(Run("x", "sapt", "part", 0))
