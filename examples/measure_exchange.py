"""What a task scores in its pool, alone (as export_task writes it), and after an older task is removed.

    python examples/measure_exchange.py --pool OUT/pool --tasks-dir DIR ...   # the options that the pool was made with

A block that is trained beside older ones, with a share of the attention on them, may come to rely on them. This
measures how much: "alone" against "in pool" for exports, and for each older task the scores of the others without it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from settings import make_parser, set_up

from peft_sapt import PeftModel
from peft_sapt.continual.answering import evaluate


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--pool", type=Path, required=True, help="folder of a saved pool, trained on the same stream")
    parser.add_argument("--out", type=Path, default=Path("exchange-out"))
    args = parser.parse_args()
    bench = set_up(args, args.out)

    def load() -> PeftModel:
        return PeftModel.from_pretrained(bench.fresh(), args.pool)

    model = load()
    names = model.tasks
    found = {"in pool": evaluate(bench, model, names), "alone": []}
    for name in names:
        model.export_task(name, args.out / "exported" / name)
        alone = PeftModel.from_pretrained(bench.fresh(), args.out / "exported" / name)
        found["alone"] += evaluate(bench, alone, [name])
    for name in names[:-1]:
        smaller = load()
        smaller.remove_task(name)
        scores = dict(zip(smaller.tasks, evaluate(bench, smaller, smaller.tasks), strict=True))
        found[f"without {name}"] = [scores.get(other, float("nan")) for other in names]
    wide = max(map(len, found)) + 2
    print(" " * wide + "".join(f"{n[:14]:>15}" for n in names))
    for label, scores in found.items():
        print(f"{label:<{wide}}" + "".join(f"{'' if s != s else f'{s:.1f}':>15}" for s in scores))
    (args.out / "exchange.json").write_text(json.dumps({"tasks": names, **found}, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
