"""Print the tables of examples/results/README.md from the raw results beside it.

    python examples/tables.py            # to the terminal
    python examples/tables.py --write    # into that guide and the README, between their markers

Each cell is the mean over seeds, with the smallest and the largest where there are several.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from reproducibility import reproducibility_table
from routing_tables import alone_table, curve_table, more_data_table, strangers_table, wordings_table
from transfer import interval

from peft_sapt.continual.labels import LABELS
from peft_sapt.continual.results import NAME, metrics_of, with_nan
from peft_sapt.report.tables import markdown, short, spread, tasks_table

COLUMNS = ("validation", "AP", "F.Ra", "FWT", "BWT", "routing")
SHORT = (
    "sequential",
    "per-task",
    "replay",
    "epi",
    "sapt-paper",
    "sapt",
)  # methods of the README's table
RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    paths = [path for path in sorted(folder.glob("*.json")) if path.name != NAME]
    return [with_nan(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def methods_table(results: list[Result]) -> str:
    """AP, F.Ra, FWT, BWT, routing and own weight by order and method."""
    head = ["order", "method", "seeds", "validation", "AP", "F.Ra", "FWT", "BWT", "routing %", "own weight"]
    rows = []
    for order in sorted({r["order"] for r in results}):
        for method, label in LABELS.items():
            found = [r for r in results if (r["method"], r["order"]) == (method, order)]
            if not found:
                continue
            measured = [metrics_of(r, results) for r in found]
            own = [r["mean_weights"][i][i] for r in found if "mean_weights" in r for i in range(len(r["tasks"]))]
            columns = (spread(m[name] for m in measured) for name in COLUMNS)
            rows.append([order, label, str(len(found)), *columns, spread(own, 2)])
    return markdown(head, rows)


def short_table(results: list[Result]) -> str:
    """The methods of ``SHORT`` in the first order of [`methods_table`], without the columns that need explaining."""
    chosen = [r for r in results if r["method"] in SHORT]
    lines = [line.split(" | ") for line in methods_table(chosen).splitlines()]
    kept = [1, 2, 4, 5, 8]  # method, seeds, AP, F.Ra, routing
    picked = [[line[i] for i in kept] for line in lines[2:] if line[0] == "| listed"]
    return markdown(["method", "seeds", "AP", "F.Ra", "routing %"], picked)


def constrained_table(results: list[Result]) -> str:
    """Free answers beside those held to the task's own labels, of the runs that have both."""
    found = [r for r in results if "constrained" in r and r["order"] == "listed"]
    head = ["method", "seeds", "AP", "F.Ra", "AP, own labels", "F.Ra, own labels", "stored, KiB"]
    rows = []
    for method, label in LABELS.items():
        own = [r for r in found if r["method"] == method]
        if own:
            measured = [metrics_of(r, results) for r in own]
            names = ("AP", "F.Ra", "AP constrained", "F.Ra constrained")
            stored = spread([r["stored_bytes"][-1] / 1024 for r in own], 0)
            rows.append([label, str(len(own)), *(spread(m[name] for m in measured) for name in names), stored])
    return markdown(head, rows)


def learned_table(results: list[Result]) -> str:
    """Score on each task when it has just been learned, free and held to its labels, beside the untrained base."""
    base = next(r for r in results if r["method"] == "base")
    rows = []
    for method, label in LABELS.items():
        for r in (r for r in results if r["method"] == method):
            for key, how in (("matrix", "free"), ("constrained", "own labels")):
                scores = (r[key][i][i] for i in range(len(r["tasks"])))
                rows.append([label, how, *(f"{score:.0f}" for score in scores)])
    return markdown(["method", "answers", *map(short, base["tasks"])], rows)


def tasks_text(results: list[Result]) -> str:
    return markdown(*tasks_table(results))


def routing_table(results: list[Result]) -> str:
    """Routing and own weight of each task at the end."""
    names = results[0]["tasks"]
    rows = []
    for method, label in LABELS.items():
        found = [r for r in results if r["method"] == method and r["order"] == "listed"]
        if found and "routing" in found[0]:
            columns = range(len(names))
            rows.append([f"{label}: routing %", *(spread((r["routing"][i] for r in found), 0) for i in columns)])
            rows.append(["own weight", *(spread((r["mean_weights"][i][i] for r in found), 2) for i in columns)])
    return markdown(["", *(short(name) for name in names)], rows)


def stream_table(results: list[Result]) -> str:
    """A long stream: routing and own weight over all tasks so far after each stage, and the scores at the end."""
    results = [r for r in results if r["order"] == "listed"]
    found = {r["method"]: r for r in results}
    methods = [m for m in LABELS if m in found and "routing_by_stage" in found[m]]
    head = ["after task", *(f"{LABELS[m]}: {what}" for m in methods for what in ("routing %", "own weight", "score"))]
    rows = []
    for stage, name in enumerate(results[0]["tasks"]):
        line = [f"{stage + 1} {short(name)}"]
        for m in methods:
            seen = slice(0, stage + 1)
            line += [
                f"{mean(found[m]['routing_by_stage'][stage][seen]):.1f}",
                f"{mean(found[m]['own_weight_by_stage'][stage][seen]):.2f}",
                f"{mean(found[m]['matrix'][stage][seen]):.1f}",
            ]
        rows.append(line)
    return markdown(head, rows)


def pseudo_table(results: list[Result]) -> str:
    """Counts of the learned attention's pseudo-samples by run and task; "-" where an earlier version did not count."""
    counted = ("drawn", "unfinished", "duplicates", "copies", "kept", "kept_copies")
    rows = []
    for r in [r for r in results if r["method"] == "sapt-paper"]:
        for name, report in r["pseudo_samples"].items():
            routed = f"{report['routed_to_own']:.0f}" if "routed_to_own" in report else "-"
            numbers = [str(report.get(key, "-")) for key in counted]
            rows.append([r["order"], str(r["seed"]), short(name), *numbers, routed])
    head = ["order", "seed", "task", "drawn", "unfinished", "repeated", "copies drawn", "kept", "copies kept"]
    return markdown([*head, "routed to their own task, %"], rows)


def transfer_table(results: list[Result]) -> str:
    """Gain over the same rows alone, with its 95 % interval; *all* is the mean over counts of a pair and seed."""
    counts = list(results[0]["scores"])
    rows = []
    for pair in [*sorted({(r["old"], r["new"]) for r in results}), None]:
        found = [r for r in results if pair in (None, (r["old"], r["new"]))]
        for arm in [a for a in found[0]["scores"][counts[0]] if a != "alone"]:
            for label, chosen in [*((c, [c]) for c in counts if pair), ("all", counts)]:
                alone, pool = ([score(r, chosen, a) for r in found] for a in ("alone", arm))
                gains = [p - a for p, a in zip(pool, alone, strict=True)]
                name = " → ".join(pair) if pair else "all pairs"
                rows.append([name, label, arm, str(len(found)), spread(alone), spread(pool), gain(gains)])
    return markdown(["pair", "rows", "arm", "runs", "alone", "in the pool", "gain (95 % interval)"], rows)


def score(result: Result, counts: list[str], arm: str) -> float:
    return mean(result["scores"][count][arm]["test"] for count in counts)


def gain(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:+.1f}"
    middle, low, high = interval(values)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def unseen_table(results: list[Result]) -> str:
    """Tasks that no pool has: base, mixture, and each block alone."""
    r = results[0]
    blocks = r["pool_tasks"]
    rows = [
        [short(name), f"{s['base']:.1f}", f"{s['mixture']:.1f}", *(f"{s['blocks'][b]:.1f}" for b in blocks)]
        for name, s in r["scores"].items()
    ]
    return markdown(["unseen task", "base", "mixture", *(f"block {b}" for b in blocks)], rows)


TABLES: dict[str, tuple[str, Callable[[list[Result]], str]]] = {
    "long_sequence": ("long_sequence", methods_table),
    "long_sequence short": ("long_sequence", short_table),
    "long_sequence constrained": ("long_sequence", constrained_table),
    "long_sequence_reduced": ("long_sequence_reduced", learned_table),
    "long_sequence_reduced end": ("long_sequence_reduced", constrained_table),
    "long_sequence tasks": ("long_sequence", tasks_text),
    "long_sequence pseudo": ("long_sequence", pseudo_table),
    "superni": ("superni", methods_table),
    "superni tasks": ("superni", tasks_text),
    "superni pseudo": ("superni", pseudo_table),
    "long_sequence_no_definitions": ("long_sequence_no_definitions", methods_table),
    "long_sequence_no_definitions routing": ("long_sequence_no_definitions", routing_table),
    "superni_no_definitions": ("superni_no_definitions", methods_table),
    "superni_no_definitions routing": ("superni_no_definitions", routing_table),
    "long_sequence_14": ("long_sequence_14", methods_table),
    "long_sequence_14 stages": ("long_sequence_14", stream_table),
    "long_sequence_14 pseudo": ("long_sequence_14", pseudo_table),
    "transfer": ("transfer", transfer_table),
    "transfer_600": ("transfer_600", transfer_table),
    "unseen": ("unseen", unseen_table),
}


ALONE = ("long", "superni", "long-definitions", "superni-definitions")  # names of the comparisons of routing alone


def routing_tables(folder: Path) -> dict[str, str]:
    """The tables of routing alone and of strangers, by name."""
    made, paths = {}, sorted((folder / "routing").glob("*.json"))
    for name in ALONE:
        found = [json.loads(p.read_text(encoding="utf-8")) for p in paths if p.name.split(".")[0] == name]
        if found:
            made[f"routing {name.replace('-', ' ')}"] = alone_table(found)
    paths = sorted((folder / "strangers").glob("*.test.hidden.*.json"))
    found = [{"name": p.name.split(".")[0], **json.loads(p.read_text(encoding="utf-8"))} for p in paths]
    if found:
        kinds = {"strangers": strangers_table, "wordings": wordings_table, "strangers curve": curve_table}
        made |= {name: make(found) for name, make in kinds.items()}
    path = folder / "more_data.json"
    if path.is_file():
        made["more data"] = more_data_table(json.loads(path.read_text(encoding="utf-8")))
    return made


def tables(folder: Path) -> dict[str, str]:
    """Every table whose results are there, by name."""
    made = routing_tables(folder)
    for name, (benchmark, make) in TABLES.items():
        text = make(results) if (results := load(folder / benchmark)) else ""
        if text.count("\n") > 1:  # more than the head and its rule
            made[name] = text
    runs = {name: load(folder / name) for name in ("superni", "long_sequence")}
    return made | {"reproducibility": reproducibility_table(runs)}


def filled(guide: str, made: dict[str, str]) -> str:
    """``guide`` with what stands between <!-- table NAME --> and <!-- end --> replaced, where there are results."""

    def put(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{made[match[1]]}\n<!-- end -->" if match[1] in made else match[0]

    return re.sub(r"<!-- table ([\w ]+) -->\n.*?<!-- end -->", put, guide, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="into README.md of the results folder")
    args = parser.parse_args()
    made = tables(args.results)
    if args.write:
        for guide in (RESULTS / "README.md", RESULTS.parents[1] / "README.md"):
            guide.write_text(filled(guide.read_text(encoding="utf-8"), made), encoding="utf-8")
        return 0
    for name, text in made.items():
        print(f"\n{name}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
