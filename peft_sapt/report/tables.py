"""Tables of a grid's results as lists of texts, and their three formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

import pandas as pd

from ..continual.labels import LABELS
from ..continual.results import DIGITS, METRICS, Result, spread_of, summarise

HEADS = {"routing": "routing %"}
Head = list[str]
Rows = list[list[str]]


def markdown(head: Head, rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex(head: Head, rows: Rows) -> str:
    """A tabular with booktabs' rules; special characters are escaped."""
    frame = pd.DataFrame([[cell.replace("`", "") for cell in row] for row in rows], columns=head)
    text = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    return text.to_latex(hrules=True).replace("±", r"$\pm$")


def csv(head: Head, rows: Rows) -> str:
    return pd.DataFrame(rows, columns=head).to_csv(index=False)


FORMATS: dict[str, Callable[[Head, Rows], str]] = {"md": markdown, "tex": latex, "csv": csv}


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean, and the range of several values; "-" of nothing."""
    found = spread_of(list(values))
    if found is None:
        return "-"
    middle = f"{found['mean']:.{digits}f}"
    if found["std"] != found["std"]:
        return middle
    return f"{middle} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def deviation(found: dict[str, float] | None, digits: int = 1) -> str:
    """Mean ± sample standard deviation; the mean alone for one seed, "-" of nothing."""
    if found is None:
        return "-"
    middle = f"{found['mean']:.{digits}f}"
    return middle if found["std"] != found["std"] else f"{middle} ± {found['std']:.{digits}f}"


def methods_table(runs: list[Result]) -> tuple[Head, Rows]:
    """Every metric by order and method, mean ± standard deviation over seeds; columns without a value are left out."""
    entries = summarise(runs)
    shown = [metric for metric in METRICS if any(entry[metric] is not None for entry in entries)]
    rows = [
        [
            entry["order"],
            LABELS[entry["method"]],
            str(len(entry["seeds"])),
            *(deviation(entry[metric], DIGITS.get(metric, 1)) for metric in shown),
        ]
        for entry in entries
    ]
    return ["order", "method", "seeds", *(HEADS.get(metric, metric) for metric in shown)], rows


def numbers_table(runs: list[Result]) -> tuple[Head, Rows]:
    """The same in full precision, one line for each method, order and metric: for other programs."""
    kinds = ("mean", "std", "min", "max")
    rows = [
        [entry["method"], entry["order"], metric, str(len(entry["seeds"])), *(repr(entry[metric][k]) for k in kinds)]
        for entry in summarise(runs)
        for metric in METRICS
        if entry[metric] is not None
    ]
    return ["method", "order", "metric", "seeds", *kinds], rows


def tasks_table(runs: list[Result], key: str = "matrix") -> tuple[Head, Rows]:
    """Scores on each task after the last one, of the first order; ``key`` may be "constrained"."""
    order = first_order(runs)
    chosen = [r for r in runs if r["order"] == order and key in r]
    names = chosen[0]["tasks"] if chosen else []
    rows = []
    for method, label in LABELS.items():
        found = [r for r in chosen if r["method"] == method]
        if found:
            rows.append([label, *(spread((r[key][-1][i] for r in found), 0) for i in range(len(names)))])
    return ["method", *(short(name) for name in names)], rows


def settings_table(runs: list[Result]) -> tuple[Head, Rows]:
    """What all runs have in common."""
    settings = runs[0]["settings"]
    counts = sorted({str(tuple(rows)) for rows in settings["rows"].values()})
    lines: list[tuple[str, Any]] = [
        ("tasks", ", ".join(runs[0]["tasks"])),
        ("rows: train, validation, scored split", " or ".join(counts)),
        ("scored", f"{settings['split']}, {settings['test_rows'] or 'all'} rows per task"),
        ("metric", settings.get("metric", "-")),
        ("base model", settings.get("model", "-")),
        *settings["budget"].items(),
        *settings["style"].items(),
        ("data, SHA-256", settings["data"]),
    ]
    return ["setting", "value"], [[name, repr(v) if name in ("head", "tail") else str(v)] for name, v in lines]


def provenance_table(runs: list[Result]) -> tuple[Head, Rows]:
    """Where the runs come from: commits, versions and machines, with seconds per run and method."""
    rows = []
    for method, label in LABELS.items():
        found = [r["provenance"] for r in runs if r["method"] == method and "provenance" in r]
        if found:
            texts = {key: ", ".join(sorted({str(p.get(key)) for p in found})) for key in ("commit", "device", "torch")}
            seconds = mean(p["seconds"]["total"] for p in found)
            rows.append([label, texts["commit"], texts["device"], texts["torch"], f"{seconds:.0f}"])
    return ["method", "commit", "device", "torch", "seconds per run"], rows


def first_order(runs: list[Result]) -> str:
    orders = [r["order"] for r in runs]
    return "listed" if "listed" in orders else orders[0]


def short(name: str) -> str:
    """A task's name as a column's head: SuperNI's go by number."""
    return name.split("_")[0].removeprefix("task") if name.startswith("task") else name
