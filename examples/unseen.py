"""What a pool makes of tasks that it never learned: its mixture, against the base model, its leading block at full
strength, and each block alone; and the first two on the tasks that it has learned.

    python examples/unseen.py --tasks-dir DIR --tasks agnews,amazon,dbpedia --unseen yelp,imdb ...

Learns the tasks of --tasks as one stream, then answers prompts of --unseen. Writes
<results>/unseen/<method>.<seed>.json.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from settings import make_parser, set_up
from tqdm.auto import tqdm

from peft_sapt.continual.answering import evaluate, weights_of_prompts
from peft_sapt.continual.grid import settings_of, text_of
from peft_sapt.continual.learner import Bench
from peft_sapt.continual.method import Found
from peft_sapt.continual.provenance import commit
from peft_sapt.continual.sapt import RECIPES, learn_pool
from peft_sapt.storage.atomic import write_atomically


def score_unseen(bench: Bench, model: PeftModel, names: list[str]) -> Found:
    """Score in percent on each task of ``names``: the mixture of the pool's own attention, the base model, and each
    block of the pool alone; beside them the mean attention on its prompts."""
    found: Found = {}
    for name in tqdm(names, desc="unseen tasks"):
        with model.disable_adapter():
            base = evaluate(bench, model, [name])[0]
        mean = weights_of_prompts(bench, model, name).mean(dim=0).tolist()
        found[name] = {
            **score_both(bench, model, name),
            "base": base,
            "blocks": {block: evaluate(bench, model, [name], sapt_task=block)[0] for block in model.tasks},
            "weights": dict(zip(model.tasks, mean, strict=True)),
        }
    return found


@contextmanager
def hard_selection(model: PeftModel) -> Iterator[None]:
    """The leading block of each prompt alone answers it, with a weight of 1."""
    config = model.base_model.pool.config
    before = config.top_k, config.renormalize
    config.top_k, config.renormalize = 1, True
    try:
        yield
    finally:
        config.top_k, config.renormalize = before


def score_both(bench: Bench, model: PeftModel, name: str) -> dict[str, float]:
    """Score of the mixture in percent, and of the leading block at full strength."""
    mixture = evaluate(bench, model, [name])[0]
    with hard_selection(model):
        return {"mixture": mixture, "hard": evaluate(bench, model, [name])[0]}


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--unseen", required=True, type=lambda text: text.split(","), help="tasks of the folder")
    parser.add_argument("--method", default="sapt-ridge", choices=list(RECIPES))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.tasks is None or set(args.tasks) & set(args.unseen):
        parser.error("--tasks names the tasks to learn, --unseen other ones.")
    learned, args.tasks = args.tasks, [*args.tasks, *args.unseen]
    with tempfile.TemporaryDirectory() as work:
        bench = set_up(args, Path(work))
        own = replace(bench, stream={name: bench.stream[name] for name in learned}, seconds={})
        own.remembering = bench.remembering
        model, _, found = learn_pool(own, RECIPES[args.method])
        result = {
            "method": args.method,
            "seed": args.seed,
            "pool_tasks": learned,
            "settings": settings_of(bench),
            "matrix": found["matrix"],
            "known": {name: score_both(bench, model, name) for name in learned},
            "scores": score_unseen(bench, model, args.unseen),
            "commit": commit(),
        }
    path = args.results / "unseen" / f"{args.method}.{args.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text_of(result))
    for name, scores in result["scores"].items():
        best = max(scores["blocks"], key=scores["blocks"].get)
        print(
            f"{name}: base {scores['base']:.1f}, mixture {scores['mixture']:.1f}, leading block alone "
            f"{scores['hard']:.1f}, best block {best} {scores['blocks'][best]:.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
