"""Learn a task from few rows after a related one, and alone: what does the pool add?

    python examples/transfer.py --tasks-dir DIR --pairs yelp+amazon,imdb+sst2 --counts 25,50,100 --seeds 0,1,2 ...

The older task is learned once for each seed; every pool then goes on from a copy of it. All arms get the same rows,
the same number of optimizer steps and the same test rows, and no task is named at test time. Writes
<results>/<name>/<old>+<new>.<seed>.json, one file as soon as it is complete, and prints the gains over all seeds with
their 95 % intervals. Files that are there are not run again. Start it twice to use two cores.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from peft import PeftModel, get_peft_model
from scipy.stats import t as student_t
from settings import make_parser, set_up
from tqdm.auto import tqdm
from transformers import set_seed

from peft_sapt.continual.answering import evaluate, weights_of_prompts
from peft_sapt.continual.grid import differences, held, settings_of, text_of
from peft_sapt.continual.learner import Bench, train
from peft_sapt.continual.method import Found, lora_config
from peft_sapt.continual.provenance import commit
from peft_sapt.continual.sapt import Recipe, arm_for, sapt_config
from peft_sapt.errors import StreamError
from peft_sapt.storage.atomic import write_atomically

ARMS = {
    "ridge": Recipe(config={"router": "ridge"}),
    "ridge-warm": Recipe(config={"router": "ridge"}, arm={"warm_start": True}),
    "learned": Recipe(arm={"replay": "rows"}),
    "learned-warm": Recipe(arm={"replay": "rows", "warm_start": True}),
}


@dataclass
class FewShot:
    """How a task is learned from few rows: so many of them, in ``steps`` optimizer steps.

    Steps are given to the Trainer as a share of epochs, whose last batch is smaller than the others, so that 40 of
    them are 52, 45 and 42 from 25, 50 and 100 rows: the same for every arm at one count, not between counts.
    """

    rows: list[int] = field(default_factory=lambda: [25, 50, 100])
    steps: int = 40
    old_rows: int = 200


def transfer(bench: Bench, old: str, new: str, few: FewShot, arms: list[str]) -> Found:
    """Scores on ``new`` in percent for each count of rows: alone, and in a pool that knows ``old``.

    Rows are drawn again for each seed, the smaller sets inside the larger ones. Beside the scores of each arm it gives
    those of the older task before and after, and the mean weight of both tasks on the new one's test prompts.

    Raises:
        StreamError: ``new`` has fewer training rows than asked for.
    """
    seed, there = bench.budget.seed, len(bench.stream[new]["train"])
    if max(few.rows) > there:
        raise StreamError(f"Task {new!r} has {there} training rows, {max(few.rows)} were asked for: lower the counts.")
    order = random.Random(seed).sample(bench.stream[new]["train"], max(few.rows))
    known = {arm: learn_old(bench, old, ARMS[arm], few) for arm in {arm.removesuffix("-warm") for arm in arms}}
    found: Found = {"old": old, "new": new, "seed": seed, "scores": {}}
    found["old_before"] = {arm: evaluate(bench, model, [old])[0] for arm, model in known.items()}
    for count in tqdm(few.rows, desc=f"{old} -> {new}"):
        own = with_rows(bench, new, order[:count])
        epochs = few.steps * bench.budget.batch_size / count
        set_seed(seed)
        alone = get_peft_model(bench.fresh(), lora_config(bench))
        train(own, alone, new, [], epochs=epochs)
        scores: Found = {"alone": {"test": evaluate(own, alone, [new])[0]}}
        scores["alone"]["validation"] = evaluate(own, alone, [new], "validation")[0]
        for arm in arms:
            model = copy.deepcopy(known[arm.removesuffix("-warm")])
            scores[arm] = learn_new(own, model, old, new, ARMS[arm], epochs)
        found["scores"][str(count)] = scores
    return found


def learn_old(bench: Bench, name: str, recipe: Recipe, few: FewShot) -> PeftModel:
    """A pool that knows task ``name``."""
    set_seed(bench.budget.seed)
    own = replace(bench, stream={name: bench.stream[name]}, seconds={})
    own.remembering = bench.remembering
    model = get_peft_model(own.fresh(), sapt_config(own, **recipe.config))
    rows = with_rows(own, name, own.stream[name]["train"][: few.old_rows])
    train(rows, model, name, [arm_for(own, **(recipe.arm or {}))], **rates(bench))
    return model


def learn_new(bench: Bench, model: PeftModel, old: str, new: str, recipe: Recipe, epochs: float) -> Found:
    """Learn ``new`` in the pool ``model``, and score both tasks without naming them."""
    set_seed(bench.budget.seed)
    model.add_task(new)
    train(bench, model, new, [arm_for(bench, **(recipe.arm or {}))], epochs=epochs, **rates(bench))
    weights = weights_of_prompts(bench, model, new).mean(dim=0).tolist()
    test = evaluate(bench, model, [new, old])
    validation = evaluate(bench, model, [new], "validation")[0]
    return {"test": test[0], "validation": validation, "old_after": test[1], "weights": weights}


def rates(bench: Bench) -> dict[str, Any]:
    return {"attention_lr": bench.budget.attention_lr, "marks_prompts": True}


def with_rows(bench: Bench, name: str, rows: list[dict[str, Any]]) -> Bench:
    """``bench`` with ``rows`` to train task ``name`` on; the base model stays shared."""
    stream = {**bench.stream, name: {**bench.stream[name], "train": rows}}
    own = replace(bench, stream=stream, seconds={})
    own.remembering = bench.remembering
    return own


def gain_over_alone(found: list[Found], arm: str, rows: int, split: str = "test") -> tuple[float, float, float]:
    """Mean over seeds of the score with the pool minus that alone, and its 95 % interval (Student's t, paired)."""
    gains = [f["scores"][str(rows)][arm][split] - f["scores"][str(rows)]["alone"][split] for f in found]
    return interval(gains)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of two or more values and the ends of its 95 % interval by Student's t."""
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def run(bench: Bench, pair: tuple[str, str], seed: int, few: FewShot, arms: list[str], path: Path) -> dict | None:
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
    parser.add_argument("--steps", type=int, default=FewShot.steps, help="optimizer steps on the new task")
    parser.add_argument("--old-rows", type=int, default=FewShot.old_rows, help="training rows of the older task")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    folder = args.results / args.name
    folder.mkdir(parents=True, exist_ok=True)
    few = FewShot(args.counts, args.steps, args.old_rows)
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
