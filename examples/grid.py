"""Run a grid of methods, orders and seeds over a folder of tasks; what is there already is not run again.

    python examples/grid.py --benchmark long_sequence --tasks-dir DIR --methods sequential,per-task,sapt,sapt-ridge \\
        --orders listed --seeds 0,1,2 --rows 96 ...

Writes <results>/<benchmark>/<method>.<order>.<seed>.json. Start it twice to use two cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from settings import make_parser, set_up

from peft_sapt.continual.grid import run_grid, runs_of
from peft_sapt.errors import StreamError


def commit() -> str | None:
    """The commit these sources are at, if they are a git checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--benchmark", required=True, help="name of the folder of results")
    parser.add_argument("--methods", required=True, type=lambda text: text.split(","))
    parser.add_argument("--orders", default=["listed"], type=lambda text: text.split(","))
    parser.add_argument("--seeds", default=[0], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    try:
        runs = runs_of(args.benchmark, args.methods, args.orders, args.seeds)
        with tempfile.TemporaryDirectory() as work:
            run_grid(set_up(args, Path(work)), runs, args.results, {"model": args.model, "commit": commit()})
    except StreamError as error:
        raise SystemExit(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
