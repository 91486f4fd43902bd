"""More data for a task that a pool has learned: what becomes of its old rows, and how well the new ones are learned.

    python examples/more_data.py --json more_data.json

A pool learns two of the quickstart's tasks, the second of which then gets new rows of three kinds: sentences of
somebody else's with the labels it knows (prompts/validation.json), those of one label alone, and prompts of a label
that it has not seen. They come alone to ``reopen_task``, with the old rows to ``reopen_task``, and alone to
``continue_task``; "at once" is a pool whose task had all rows from the start. No task is named at test time. Old rows
are the task's validation rows, new ones such as were not trained on.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from settings import make_parser, set_up
from synthetic import PLEAS, Row, make_stream

from peft_sapt.continual.answering import answers, mean_score
from peft_sapt.continual.learner import Bench, train
from peft_sapt.continual.prompts import encode_rows, left_padded
from peft_sapt.continual.provenance import environment
from peft_sapt.continual.sapt import Recipe, SaptMethod

FIRST, TASK = "headlines", "tickets"
ROUTERS = ("attention", "ridge")
ACCOUNT = (
    "my loyalty points are gone",
    "I want to close my profile",
    "my nickname has to be changed",
    "two profiles of mine should be merged",
    "my birthday is wrong in my profile",
    "the phone number in my profile is old",
    "my membership shows silver and not gold",
    "I do not find my saved lists",
)
WAYS = ("at once", "reopen_task, new rows alone", "reopen_task, old rows too", "continue_task, new rows alone")


def row(text: str, label: str) -> Row:
    return {"task": TASK, "instruction": "", "input": text, "output": [label]}


def new_rows(kind: str, texts: dict[str, Any], seed: int) -> tuple[list[Row], list[Row]]:
    """Training and test rows of one kind."""
    said = [row(item["input"], item["label"]) for item in texts["wordings"][TASK]]
    random.Random(seed).shuffle(said)
    if kind == "other wordings":
        return said[: len(said) // 2], said[len(said) // 2 :]
    if kind == "one label alone":
        own = [r for r in said if r["output"] == said[0]["output"]]
        return own[: len(own) // 2], own[len(own) // 2 :]
    rng = random.Random(seed)
    made = [
        [row(f"Ticket {rng.randint(10, 99)}: {text}. {plea}", "account") for text in ACCOUNT] for plea in PLEAS[:3]
    ]
    return [*made[0], *made[1]], made[2]


def learn(method: SaptMethod, name: str, rows: list[Row]) -> None:
    """Train the pool's current task on ``rows``, at least as many steps as an epoch of the old ones has."""
    bench = method.bench
    repeated = rows * max(1, -(-48 // len(rows)))
    encoded = encode_rows(bench.tokenizer, repeated, bench.style, bench.budget.max_answer)
    train(bench, method.model, name, [method.arm], rows=encoded, **method.training)


def measured(method: SaptMethod, rows: list[Row]) -> dict[str, float]:
    """Percent of ``rows`` answered right, the weight of the task's blocks, percent left to the base."""
    bench, model = method.bench, method.model
    weights = model.attention_weights(**left_padded(bench.prompts(rows), bench.tokenizer.pad_token_id))
    own = [i for i, name in enumerate(model.tasks) if name.startswith(TASK)]
    return {
        "right": mean_score(bench, rows, answers(bench, model, rows)),
        "own weight": float(weights[:, own].sum(dim=1).mean()),
        "left to base": 100.0 * float((weights.sum(dim=1) == 0).float().mean()),
    }


def run(
    bench: Bench, router: str, texts: dict[str, Any], kinds: list[str], ways: list[str], seed: int
) -> list[dict[str, Any]]:
    found = []
    stream = bench.stream
    old, test = stream[TASK]["train"], stream[TASK]["validation"]
    started = SaptMethod(bench, Recipe(config={"router": router}))
    started.learn(FIRST)
    learned = copy.deepcopy(started)
    learned.learn(TASK)
    for kind in kinds:
        rows, unseen = new_rows(kind, texts, seed)
        before = {"old": measured(learned, test), "new": measured(learned, unseen)}
        found.append({"router": router, "rows": kind, "way": "before", **before})
        for way in ways:
            method = copy.deepcopy(started if way == "at once" else learned)
            if way == "at once":
                method.model.add_task(TASK)
            elif way.startswith("reopen_task"):
                method.model.reopen_task(forget=way.endswith("alone"))
            else:
                method.model.continue_task(TASK)
            many = rows if way.endswith("alone") else [*old, *(rows * max(1, len(old) // len(rows) // 2))]
            learn(method, method.model.current_task, many)
            after = {"old": measured(method, test), "new": measured(method, unseen)}
            found.append({"router": router, "rows": kind, "way": way, **after})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    kinds = ["other wordings", "one label alone", "a new label"]
    parser.add_argument("--routers", type=lambda text: text.split(","), default=list(ROUTERS))
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=kinds)
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS))
    parser.add_argument("--texts", type=Path, default=Path(__file__).parent / "prompts" / "validation.json")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = json.loads(args.texts.read_text(encoding="utf-8"))
    stream = {name: make_stream(args.seed)[name] for name in (FIRST, TASK)}
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as work:
        bench = set_up(args, Path(work))
        bench.stream = stream
        for router in args.routers:
            found += run(bench, router, texts, args.kinds, args.ways, args.seed)
    if args.json:
        about = {"seed": args.seed, "texts": args.texts.stem, "environment": environment()}
        args.json.write_text(json.dumps({"runs": found, **about}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
