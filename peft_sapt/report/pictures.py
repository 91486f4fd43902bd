"""Pictures of a grid's results: attention as heat-maps, forgetting by task, what is stored as the stream grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..continual.labels import LABELS
from ..continual.results import Result
from ..errors import StreamError
from ..hub.heatmap import can_draw, draw_matrix
from .tables import first_order, short

VIEWS = {"train_weights": "training prompts, when learned", "mean_weights": "held-out prompts, at the end"}


def check_can_draw() -> None:
    """Raises [`StreamError`] where matplotlib is not installed."""
    if not can_draw():
        raise StreamError(
            "Pictures are drawn with matplotlib, which is not installed: pip install matplotlib, or leave them out "
            "(report --no-pictures, bench --no-report)."
        )


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_heatmaps(names: list[str], found: dict[str, Any], path: Path) -> None:
    """Mean attention of each task's prompts (rows) over the blocks of the pool (columns), as in the paper's Fig. 3.

    Args:
        found: has ``train_weights`` and ``mean_weights``, both [T][T].
    """
    plot, many = pyplot(), len(names) > 8
    size = 2.2 + (0.5 if many else 0.9) * len(names)
    figure, pair = plot.subplots(1, 2, figsize=(2 * size + 0.8, size + 0.5), layout="constrained", sharey=True)
    labels = [short(name) for name in names]
    for axes, (key, title) in zip(pair, VIEWS.items(), strict=True):
        image = draw_matrix(axes, labels, found[key])
        axes.set_title(title)
    pair[0].set_ylabel("prompts of")
    figure.colorbar(image, ax=pair, shrink=0.8, label="mean attention weight")
    figure.savefig(path, dpi=120)
    plot.close(figure)


def by_method(runs: list[Result]) -> dict[str, list[Result]]:
    """Runs of the first order by method, in the order of the tables."""
    order = first_order(runs)
    found = {m: [r for r in runs if r["method"] == m and r["order"] == order] for m in LABELS}
    return {method: members for method, members in found.items() if members}


def styles(methods: list[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each method, so that lines can be told apart in grey too."""
    colours, dashes = pyplot().get_cmap("tab10").colors, ("-", "--", ":", "-.")
    return {m: {"color": colours[i % 10], "linestyle": dashes[i % 4]} for i, m in enumerate(methods)}


def draw_forgetting(runs: list[Result], path: Path) -> None:
    """Score on each task from the stage that learns it to the end, mean over seeds, one panel a task."""
    plot, groups = pyplot(), by_method(runs)
    names = next(iter(groups.values()))[0]["tasks"]
    count = len(names)
    columns = min(5, math.ceil(math.sqrt(count)))
    lines = math.ceil(count / columns)
    figure, panels = plot.subplots(
        lines, columns, figsize=(3.1 * columns, 2.3 * lines + 1.0), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    look = styles(list(groups))
    for index, axes in enumerate(panels.flat):
        if index >= count:
            axes.axis("off")
            continue
        for method, members in groups.items():
            scores = np.mean([[row[index] for row in r["matrix"]] for r in members], axis=0)[index:]
            stages = range(index + 1, count + 1)
            axes.plot(stages, scores, label=LABELS[method].replace("`", ""), marker=".", **look[method])
        axes.set_title(short(names[index]), fontsize=10)
        axes.set_xticks(range(1, count + 1, 1 + (count - 1) // 8))
        axes.tick_params(labelbottom=index + columns >= count)  # the lowest of its column
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    figure.supxlabel("tasks learned so far")
    figure.supylabel("score, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=9)
    figure.savefig(path, dpi=120)
    plot.close(figure)


def draw_growth(runs: list[Result], path: Path) -> bool:
    """Bytes stored beside the base model after each task; False if no run has counted them."""
    groups = {m: found[0] for m, found in by_method(runs).items() if any(found[0].get("stored_bytes", []))}
    if not groups:
        return False
    plot, look = pyplot(), styles(list(groups))
    figure, axes = plot.subplots(figsize=(7, 4), layout="constrained")
    for method, run in groups.items():
        sizes = [size / 1024 for size in run["stored_bytes"]]
        axes.plot(range(1, len(sizes) + 1), sizes, marker="o", label=LABELS[method].replace("`", ""), **look[method])
    names = [short(name) for name in next(iter(groups.values()))["tasks"]]
    axes.set_xticks(range(1, len(names) + 1), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_ylabel("stored beside the base model, KiB")
    axes.set_xlabel("after task")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)
    plot.close(figure)
    return True
