"""The report of a folder of results: report.md, its tables in other formats, and its pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..continual.results import Result, load_runs
from ..storage.atomic import write_atomically
from .pictures import by_method, check_can_draw, draw_forgetting, draw_growth, draw_heatmaps
from .tables import FORMATS, methods_table, numbers_table, provenance_table, settings_table, tasks_table

TABLES = {
    "methods": ("Mean ± standard deviation over seeds, in percent", methods_table),
    "tasks": ("Score on each task after the last one", tasks_table),
    "tasks_constrained": (
        "The same with answers held to the task's own labels",
        lambda runs: tasks_table(runs, "constrained"),
    ),
    "settings": ("Settings", settings_table),
    "provenance": ("Provenance", provenance_table),
}
NOTES = {
    "methods": "*constrained*: answers held to the task's own labels, over the tasks that have any, which leaves out "
    "what is lost to a forgotten format. *validation*: mean score on the validation rows at the end, to choose by.",
}


def write_report(folder: Path, out: Path, formats: Iterable[str] = tuple(FORMATS), pictures: bool = True) -> Path:
    """Write the report of all results in ``folder`` to ``out``, and return the path of its report.md.

    Raises:
        StreamError: there are no results, a file is not one, or pictures cannot be drawn. Nothing is written then.
    """
    if pictures:
        check_can_draw()
    runs, formats = load_runs(folder), list(formats)
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {runs[0]['benchmark']}"]
    for name, (title, make) in TABLES.items():
        head, rows = make(runs)
        if not rows:
            continue
        parts += [f"## {title}", FORMATS["md"](head, rows), *([NOTES[name]] if name in NOTES else [])]
        for kind in formats:
            if kind != "md":
                write_atomically(out / f"{name}.{kind}", FORMATS[kind](head, rows).encode())
    if "csv" in formats:
        write_atomically(out / "numbers.csv", FORMATS["csv"](*numbers_table(runs)).encode())
    if pictures:
        parts += drawn(runs, out)
    path = out / "report.md"
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())
    return path


def drawn(runs: list[Result], out: Path) -> list[str]:
    """Draw what the results allow, and give the lines that show it."""
    draw_forgetting(runs, out / "forgetting.png")
    lines = ["## Forgetting", "![score on each task as others are learned](forgetting.png)"]
    if draw_growth(runs, out / "growth.png"):
        lines += ["## Growth", "![bytes stored after each task](growth.png)"]
    pools = {m: found[0] for m, found in by_method(runs).items() if "train_weights" in found[0]}
    if pools:
        lines.append("## Attention")
    for method, run in pools.items():
        name = f"attention.{method}.png"
        draw_heatmaps(run["tasks"], run, out / name)
        lines += [f"{method}, seed {run['seed']}:", f"![attention of {method}]({name})"]
    return lines
