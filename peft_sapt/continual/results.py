"""The runs of a grid read back, and what follows from them: one results.json for all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ..errors import StreamError
from ..storage.atomic import read_bounded, write_atomically
from .grid import Run, text_of
from .labels import LABELS, alone_of
from .metrics import average_performance, backward_transfer, forgetting_of, forgetting_rate, forward_transfer

Result = dict[str, Any]
NAME = "results.json"
BULKY = (
    "prompt_weights",
    "new_task_weights",
    "gates_while_training",  # as older results call the one before
)  # kept in the runs' own files
METRICS = ("validation", "AP", "F.Ra", "FWT", "BWT", "routing", "own weight", "AP constrained", "F.Ra constrained")
DIGITS = {"own weight": 2}  # after the point, where one is not enough
BOUNDS = ("base", "per-task", "multi-task", "prompt-per-task", "prog-prompt-known")  # which cannot forget


def load_runs(folder: Path) -> list[Result]:
    """Results of all runs in ``folder``, by method, order and seed.

    Raises:
        StreamError: there is none, or a file is not a result.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == NAME:
            continue
        try:
            result = with_nan(json.loads(read_bounded(path)))
            key = (list(LABELS).index(result["method"]), result["order"], result["seed"])
            if np.asarray(result["matrix"], dtype=float).shape != (len(result["tasks"]),) * 2:
                raise ValueError("its matrix does not fit its tasks")
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise StreamError(f"{path} is not the result of a run ({error!r}): remove it, or run it again.") from error
        found.append((key, result))
    if not found:
        raise StreamError(f"{folder} holds no results: give the folder that `peft-sapt bench --out` has written.")
    return [result for _, result in sorted(found, key=lambda pair: pair[0])]


def with_nan(value: Any) -> Any:
    """Null back to NaN inside score matrices."""
    if isinstance(value, dict):
        return {k: with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [float("nan") if v is None else with_nan(v) for v in value]
    return value


def single_scores(result: Result, runs: Iterable[Result]) -> list[float] | None:
    """Scores of each of ``result``'s tasks learned alone with its seed, from whatever order measured them."""
    wanted = (alone_of(result["method"]), result["seed"])
    known: dict[str, float] = {}
    for other in runs:
        if (other["method"], other["seed"]) == wanted and "single" in other:
            known |= dict(zip(other["tasks"], other["single"], strict=True))
    return [known[name] for name in result["tasks"]] if set(result["tasks"]) <= set(known) else None


def metrics_of(result: Result, runs: Iterable[Result]) -> dict[str, float]:
    """What a run amounts to, in percent, NaN where it was not measured or means nothing.

    F.Ra, FWT and BWT mean nothing for ``BOUNDS``. The constrained ones are over the tasks with labels of their own.
    """
    matrix, nan = result["matrix"], float("nan")
    single, bound, held = single_scores(result, runs), result["method"] in BOUNDS, labelled(result)
    own = [row[i] for i, row in enumerate(result["mean_weights"])] if "mean_weights" in result else []
    return {
        "validation": mean(result["validation"]),
        "AP": average_performance(matrix),
        "F.Ra": nan if bound else forgetting_rate(matrix),
        "FWT": nan if bound or single is None else forward_transfer(matrix, single),
        "BWT": nan if bound else backward_transfer(matrix),
        "routing": mean(result["routing"]) if "routing" in result else nan,
        "own weight": mean(own) if own else nan,
        "AP constrained": nan if held is None else float(np.nanmean(held[-1])),
        "F.Ra constrained": nan if held is None or bound else forgetting_of(held),
    }


def labelled(result: Result) -> np.ndarray | None:
    """The matrix of constrained scores, [T, T], with NaN in the columns of tasks of free text; None if all are."""
    if "constrained" not in result:
        return None
    matrix = np.asarray(result["constrained"], dtype=float)
    return None if np.isnan(matrix[-1]).all() else matrix


def summarise(runs: list[Result]) -> list[dict[str, Any]]:
    """One entry for each method and order: seeds, and [`spread_of`] every metric over them."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in runs:
        groups.setdefault((result["order"], list(LABELS).index(result["method"])), []).append(result)
    entries = []
    for (order, _), members in sorted(groups.items()):
        measured = [metrics_of(member, runs) for member in members]
        seeds = [member["seed"] for member in members]
        entry: dict[str, Any] = {"method": members[0]["method"], "order": order, "seeds": seeds}
        entry |= {metric: spread_of([m[metric] for m in measured]) for metric in METRICS}
        entries.append(entry)
    return entries


def spread_of(values: list[float]) -> dict[str, float] | None:
    """Mean, sample standard deviation (NaN of one), smallest and largest of what is not NaN; None of nothing."""
    known = [value for value in values if value == value]
    if not known:
        return None
    deviation = stdev(known) if len(known) > 1 else float("nan")
    return {"mean": mean(known), "std": deviation, "min": min(known), "max": max(known)}


def write_results(folder: Path, runs: list[Run]) -> Path | None:
    """Write results.json of all ``runs`` under ``folder``, or return None while some are missing.

    Everything but its ``provenance`` depends on settings, data and seeds alone.
    """
    paths = [run.path(folder) for run in runs]
    if not all(path.exists() for path in paths):
        return None
    found = [with_nan(json.loads(read_bounded(path))) for path in paths]
    provenance = {path.name: result.pop("provenance") for path, result in zip(paths, found, strict=True)}
    written = {
        "benchmark": runs[0].benchmark,
        "grid": [asdict(run) for run in runs],
        "summary": summarise(found),
        "runs": [{k: v for k, v in result.items() if k not in BULKY} for result in found],
        "provenance": provenance,
    }
    target = paths[0].parent / NAME
    write_atomically(target, text_of(written))
    return target
