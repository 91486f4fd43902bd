"""Draw the attention of one run: on training prompts when each task was learned, and on scored prompts at the end.

python examples/heatmaps.py examples/results/long_sequence/sapt.listed.0.json attention.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from peft_sapt.report.pictures import draw_heatmaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="of a run of `peft-sapt bench` or `train` with a pool")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    found = json.loads(args.result.read_text(encoding="utf-8"))
    draw_heatmaps(found["tasks"], found, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
