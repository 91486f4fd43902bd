"""Learn a task from few rows after a related one, and alone: what does the pool add?

    python examples/transfer.py --tasks-dir DIR --pairs yelp+amazon,imdb+sst2 --counts 25,50,100 --seeds 0,1,2 ...

Writes <results>/<name>/<old>+<new>.<seed>.json, one file as soon as it is complete, and prints the gains over all
seeds with their 95 % intervals. Files that are there are not run again. Start it twice to use two cores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from settings import make_parser, set_up

from peft_sapt.continual.grid import differences, held, settings_of, text_of
from peft_sapt.continual.learner import Bench
from peft_sapt.continual.provenance import commit
from peft_sapt.continual.transfer import ARMS, Few, gain_over_alone, transfer
from peft_sapt.errors import StreamError
from peft_sapt.files import write_atomically


def run(bench: Bench, pair: tuple[str, str], seed: int, few: Few, arms: list[str], path: Path) -> dict | None:
    """The result in ``path``, made now if it is not there; None while another process makes it."""
    own = replace(
        bench, stream={name: bench.stream[name] for name in pair}, budget=replace(bench.budget, seed=seed), seconds={}
    )
    own.remembering = bench.remembering
    settings = {**settings_of(own), "few": asdict(few), "arms": arms}
    with held(path) as mine:
        if path.exists():
            known = json.loads(path.read_text(encoding="utf-8"))
            other = differences(known["settings"], settings)
            if other:
                raise StreamError(f"{path} was made with other settings {other}: give another --name, or delete it.")
            return known
        if not mine:
            return None
        begun = time.perf_counter()
        found = transfer(own, *pair, few, arms)
        found |= {"settings": settings, "commit": commit(), "seconds": round(time.perf_counter() - begun)}
        write_atomically(path, text_of(found))
        print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)
    return found


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--name", default="transfer", help="name of the folder of results")
    parser.add_argument("--pairs", required=True, type=lambda text: [tuple(p.split("+")) for p in text.split(",")])
    parser.add_argument("--counts", default=[25, 50, 100], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--seeds", default=[0, 1, 2], type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--arms", default=list(ARMS), type=lambda text: text.split(","), help=f"among {list(ARMS)}")
    parser.add_argument("--steps", type=int, default=Few.steps, help="optimizer steps on the new task")
    parser.add_argument("--old-rows", type=int, default=Few.old_rows, help="training rows of the older task")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    folder = args.results / args.name
    folder.mkdir(parents=True, exist_ok=True)
    few = Few(args.counts, args.steps, args.old_rows)
    with tempfile.TemporaryDirectory() as work:
        bench = set_up(args, Path(work))
        try:
            found = {
                pair: [run(bench, pair, s, few, args.arms, folder / f"{'+'.join(pair)}.{s}.json") for s in args.seeds]
                for pair in args.pairs
            }
        except StreamError as error:
            raise SystemExit(str(error)) from None
    report({pair: [f for f in results if f] for pair, results in found.items()}, args.arms, args.counts)
    return 0


def report(found: dict[tuple[str, str], list[dict]], arms: list[str], counts: list[int]) -> None:
    print("pair | rows | arm | seeds | gain over alone | 95 % interval")
    for pair, results in found.items():
        for count in counts:
            for arm in arms if len(results) > 1 else []:
                mean, low, high = gain_over_alone(results, arm, count)
                print(f"{'+'.join(pair)} | {count} | {arm} | {len(results)} | {mean:+.1f} | {low:+.1f} to {high:+.1f}")


if __name__ == "__main__":
    sys.exit(main())
