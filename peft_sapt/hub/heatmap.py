"""The attention of a pool as a heat-map. Drawn with matplotlib, where it is installed."""

from __future__ import annotations

import importlib.util
import io
from functools import lru_cache
from typing import Any

Row = tuple[float, ...] | None


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_matrix(axes: Any, names: list[str], rows: Any) -> Any:
    """Weights [T][T] of each task's prompts (rows) over the blocks, on matplotlib ``axes``; a row may be None."""
    many = len(names) > 8
    blank = [float("nan")] * len(names)
    image = axes.imshow([blank if row is None else list(row) for row in rows], vmin=0, vmax=1, cmap="Blues")
    labels = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    axes.set_xlabel("block of the pool")
    for i, row in enumerate(rows):
        for j, weight in enumerate(() if row is None else row):
            if many and weight < 0.005:
                continue  # a page of zeros hides the numbers that count
            text = f"{weight:.2f}".removeprefix("0") if many else f"{weight:.2f}"
            color = "white" if weight > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8 if many else 10)
    return image


@lru_cache(maxsize=4)
def heatmap_png(names: tuple[str, ...], rows: tuple[Row, ...]) -> bytes:
    """A PNG of the matrix; the same matrix gives the same bytes, so that no unchanged picture is pushed again."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 3.0 + (0.45 if len(names) > 8 else 0.8) * len(names)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")  # no pyplot: the user's figures are their own
    axes = figure.subplots()
    image = draw_matrix(axes, list(names), rows)
    axes.set_ylabel("stored prompts of")
    figure.colorbar(image, ax=axes, shrink=0.8, label="mean attention weight")
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()
