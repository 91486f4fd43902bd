"""The published results: summaries follow from the raw matrices, and the guides' tables from the raw files."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import RESULTS, ROOT

GRID = sorted(p for p in RESULTS.glob("*/*.json") if p.name.count(".") == 3)


def check_summary(path: Path) -> None:
    """The summary of a stored run follows from its matrix, and its name from its settings."""
    found = json.loads(path.read_text())
    matrix = np.array([[np.nan if v is None else v for v in row] for row in found["matrix"]])
    count = len(matrix)
    assert path.name == f"{found['method']}.{found['order']}.{found['seed']}.json"
    assert path.parent.name == found["benchmark"] and len(found["tasks"]) == count
    assert np.isnan(matrix[np.triu_indices(count, 1)]).all()
    best = np.array([np.nanmax(matrix[: count - 1, j]) for j in range(count - 1)])
    forgotten = float(np.mean(best - matrix[-1, :-1]))
    back = float(np.sum(matrix[-1] - matrix.diagonal()) / count)
    expected = {"AP": float(matrix[-1].mean()), "F.Ra": forgotten, "BWT": back}
    assert found["summary"] == pytest.approx(expected, abs=1e-9)
    assert forgotten * (count - 1) / count >= -back - 1e-9
    for weights in found.get("mean_weights", []):
        assert math.isclose(sum(weights), 1, abs_tol=1e-3)
    assert found["provenance"]["commit"] and found["settings"]["data"]


def test_every_summary_follows_from_its_matrix() -> None:
    violations = []
    for path in GRID:
        try:
            check_summary(path)
        except AssertionError as error:
            violations.append(f"{path.relative_to(RESULTS)}: {error}")
    assert len(GRID) >= 60 and not violations, "\n" + "\n".join(violations)


def test_the_tables_are_made_from_the_raw_results() -> None:
    from tables import filled, tables

    for guide in (RESULTS / "README.md", ROOT / "README.md"):
        text = guide.read_text(encoding="utf-8")
        assert "<!-- table " in text
        assert filled(text, tables(RESULTS)) == text, f"{guide}: run: python examples/tables.py --write"


def test_every_table_is_shown() -> None:
    from tables import tables

    guides = (RESULTS / "README.md").read_text() + (ROOT / "README.md").read_text()
    assert set(tables(RESULTS)) == set(re.findall(r"<!-- table ([\w ]+) -->", guides))


def test_the_gpus_times_are_those_of_the_raw_files() -> None:
    """Medians of the quotients with plain LoRA, round by round."""
    guide = (ROOT / "peft_sapt" / "ops" / "README.md").read_text()

    def ratio(path: str, name: str, turned: bool = False) -> str:
        found = json.loads((RESULTS / "h200" / path).read_text())
        times = found["seconds"]["fast"] if turned else found["tasks"]["15"]["seconds"]
        pairs = list(zip(times[name], times["plain LoRA"], strict=True))
        low, middle, high = np.array(statistics.quantiles([b / a if turned else a / b for a, b in pairs], n=4))
        return f"{middle:.3f} ({low:.3f} to {high:.3f})" if turned else f"{middle:.2f} ({low:.2f} to {high:.2f})"

    small, large = "step_llama-1b.json", "step_llama-7b.json"
    rows = {
        "pool, by Triton": (ratio(small, "pool, kernel triton"), ratio(large, "pool")),
        "pool, by torch": (ratio(small, "pool"), ratio(large, "pool, kernel torch")),
        "naive loop of the official release": (ratio(small, "naive loop"), "not run"),
        "pool": ("480", ratio("generate_llama-1b.json", "pool", turned=True)),
        "Arrow": ("255", ratio("generate_llama-1b.json", "Arrow", turned=True)),
    }
    for name, (first, second) in rows.items():
        assert f"| {name} | {first} | {second} |" in guide, (name, first, second)
    first, second = (cell.split()[0] for cell in (rows["pool, by torch"][0], rows["pool, by Triton"][1]))
    naive = rows["naive loop of the official release"][0].split()[0]
    assert f"(`--model llama-1b`, `llama-7b`) | {first}, {second} | {naive} |" in guide
    errors: dict[str, float] = {}
    for result in json.loads((RESULTS / "h200" / "kernels.json").read_text())["numerics"]:
        assert result["ok"] and max(result["errors"].values()) <= result["limit"]
        errors[result["dtype"]] = max(errors.get(result["dtype"], 0.0), *result["errors"].values())
    shown = " | ".join(f"{errors[name]:.1e}" for name in ("float32", "float16", "bfloat16"))
    assert f"| Triton, H200 | {shown} |" in guide
