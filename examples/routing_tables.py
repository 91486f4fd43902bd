"""Tables of what routing_alone.py and strangers.py have measured, for tables.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from peft_sapt.report.tables import markdown, spread

Result = dict[str, Any]
FEATURES = ("hidden", "both", "mean", "max")
WAYS = (
    "before",
    "at once",
    "reopen_task, old rows too",
    "continue_task, new rows alone",
    "reopen_task, new rows alone",
)  # of more_data.py
KINDS = {
    "attention-statistics": "learned attention, draws from statistics",
    "attention-rows": "learned attention, 20 real rows",
    "ridge": '`router="ridge"`',
}


def alone_table(results: list[Result]) -> str:
    """Percent of test prompts led by their own block: mean over tasks, and the worst task."""
    head = ["features", "router and replay", "training prompts a task", "order", "seeds", "mean", "worst task"]
    rows = []
    keys = sorted({(r["features"], r["kind"], r["rows"], r["order"]) for r in results}, key=place)
    for key in keys:
        found = [r for r in results if (r["features"], r["kind"], r["rows"], r["order"]) == key]
        means, worst = [mean(r["led"]) for r in found], [min(r["led"]) for r in found]
        rows.append([f"`{key[0]}`", KINDS[key[1]], str(key[2]), key[3], str(len(found)), spread(means), spread(worst)])
    return markdown(head, rows)


def place(key: tuple[str, str, int, str]) -> tuple[int, int, int, str]:
    features, kind, rows, order = key
    return FEATURES.index(features), list(KINDS).index(kind), -rows, order


def strangers_table(results: list[Result]) -> str:
    """By pool: everyday prompts left to the base, in each form, and the pool's own."""
    forms = list(results[0]["strangers_left_to_base"]) if results else []
    head = ["pool", "router", *forms, "own prompts"]
    rows = []
    for r in in_order(results):
        shares = [f"{r['strangers_left_to_base'][form]:.1f}" for form in forms]
        rows.append([r["name"], r["router"], *shares, f"{mean(own['left_to_base'] for own in r['own'].values()):.2f}"])
    return markdown(head, rows)


def wordings_table(results: list[Result]) -> str:
    """By pool: other people's sentences led by their block, and left to the base; renderings of trained prompts."""
    head = [
        "pool",
        "router",
        "led by their block, %",
        "worst task",
        "left to the base, %",
        "renderings that keep 95 %",
    ]
    rows = []
    for r in in_order(results):
        led, away = ([words[name] for words in r["words"].values()] for name in ("led", "left_to_base"))
        plain = r["renderings"]["plain"]["own_weight"]
        others = [value["own_weight"] for kind, value in r["renderings"].items() if kind != "plain"]
        kept = f"{sum(w >= 0.95 * plain for w in others)} of {len(others)}"
        rows.append([r["name"], r["router"], f"{mean(led):.1f}", f"{min(led):.1f}", f"{mean(away):.1f}", kept])
    return markdown(head, rows)


def curve_table(results: list[Result]) -> str:
    """What other limits would do: strangers left to the base in their worst form, own prompts, other wordings."""
    head = ["pool", "added to each limit", "strangers left to the base, %", "own prompts, %", "other wordings, %"]
    rows = []
    for r in in_order(results):
        if r["router"] != "attention":
            continue  # limits are the same under either router
        for point in r["curve"]:
            if abs(point["offset"]) <= 0.2 and round(100 * point["offset"]) % 10 == 0:
                numbers = [f"{point[name]:.1f}" for name in ("strangers", "own", "words")]
                rows.append([r["name"], f"{point['offset']:+.1f}", *numbers])
    return markdown(head, rows)


def more_data_table(found: Result) -> str:
    """Old rows and new ones answered right, and the weight of the task's blocks on each, by router and way."""
    head = ["new rows", "way", "router", "old rows right, %", "new rows right, %", "weights, old and new"]
    rows = []
    runs = found["runs"]
    for run in sorted(runs, key=lambda r: (r["rows"], WAYS.index(r["way"]), r["router"])):
        weights = f"{run['old']['own weight']:.2f}, {run['new']['own weight']:.2f}"
        right = (f"{run[which]['right']:.0f}" for which in ("old", "new"))
        rows.append([run["rows"], run["way"], run["router"], *right, weights])
    return markdown(head, rows)


def in_order(results: list[Result]) -> list[Result]:
    return sorted(results, key=lambda r: (FEATURES.index(r["features"]), r["name"], r["router"]))
