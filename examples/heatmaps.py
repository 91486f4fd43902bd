"""Draw the attention of one run: on training prompts when each task was learned, and on scored prompts at the end.

python examples/heatmaps.py examples/results/long_sequence/sapt.listed.0.json attention.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

VIEWS = {"train_weights": "training prompts, when learned", "mean_weights": "held-out prompts, at the end"}


def draw_heatmaps(names: list[str], found: dict[str, Any], path: Path) -> None:
    """Mean attention of each task's prompts (rows) over the blocks of the pool (columns), as in the paper's Fig. 3.

    Args:
        found: has ``train_weights`` and ``mean_weights``, both [T][T].
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.2 + 0.9 * len(names)
    figure, pair = pyplot.subplots(1, 2, figsize=(2 * size + 0.8, size), layout="constrained")
    for axes, (key, title) in zip(pair, VIEWS.items(), strict=True):
        image = axes.imshow(found[key], vmin=0, vmax=1, cmap="Blues")
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("block of the pool")
        axes.set_title(title)
        for i, row in enumerate(found[key]):
            for j, weight in enumerate(row):
                color = "white" if weight > 0.6 else "black"
                axes.text(j, i, f"{weight:.2f}", ha="center", va="center", color=color)
    pair[0].set_ylabel("prompts of")
    figure.colorbar(image, ax=pair, shrink=0.8, label="mean attention weight")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="of a run of grid.py with a pool")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    found = json.loads(args.result.read_text(encoding="utf-8"))
    draw_heatmaps(found["tasks"], found, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
