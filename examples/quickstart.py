"""Learn a stream of text tasks with sequential LoRA and with SAPT, and compare what is left of each task at the end.

    python examples/quickstart.py                                  # four made-up tasks, SmolLM2-135M, CPU
    python examples/quickstart.py --tasks-dir DIR --model MODEL    # your data, a Hub id or a folder

Writes results.json, attention.png and the pool to --out. Without --tasks-dir it exits with status 1 unless sequential
LoRA forgets (F.Ra >= 20) and SAPT does not (F.Ra <= 5, AP at least 15 points higher, routing >= 95 %).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pace import choose_threads, seconds_of_a_pass
from settings import make_parser, set_up

from peft_sapt import PeftModel
from peft_sapt.arm.progress import say
from peft_sapt.continual.answering import answers
from peft_sapt.continual.learner import Bench
from peft_sapt.continual.method import learn_stream
from peft_sapt.continual.methods import METHODS
from peft_sapt.continual.metrics import average_performance, backward_transfer, forgetting_rate, forward_transfer
from peft_sapt.continual.sapt import RECIPES, learn_pool
from peft_sapt.report.pictures import draw_heatmaps

PASSES = {"sequential": 90.0, "per-task": 60.0, "sapt": 150.0}  # of 8 rows, that a method takes on the made-up tasks
ABOUT = {
    "sequential": "one LoRA for all tasks, each of which overwrites those before it",
    "per-task": "a LoRA for each task, which is named at test time: what can be reached",
    "sapt": "a pool of blocks under a shared attention; no task is named",
}
TERMS = """
AP    mean score over all tasks after the last one
F.Ra  what older tasks have lost by then, from their best score on, mean
FWT   how much better a task is learned in the stream than alone, mean; negative is worse
BWT   how much older tasks have changed since they were learned, mean; negative is forgetting
routing  share of prompts whose own task has the largest weight"""
NEXT = """
What to type next:
  {here}python examples/chat.py --pool {pool} --wrap '{{}}\\nOutput:'
      then, for example: Ticket 7: I cannot log in.
  {here}peft-sapt pool show {pool}
  {here}python examples/train_stream.py --out my-pool
      the loop to copy for tasks of your own (README, "Learn a stream")"""


def summary(matrix: list[list[float]], single: list[float] | None) -> dict[str, float | None]:
    return {
        "AP": average_performance(matrix),
        "F.Ra": forgetting_rate(matrix),
        "FWT": None if single is None else forward_transfer(matrix, single),
        "BWT": backward_transfer(matrix),
    }


def show(results: dict[str, Any]) -> None:
    """The score matrices and the summary as text."""
    names, single = results["tasks"], results.get("per-task", {}).get("single")
    methods = [m for m in METHODS if m in results and m != "per-task"]
    wide = max(map(len, names)) + 2
    for method in methods:
        print(f"\n{method}: score on each task (columns) after each stage (rows), in percent")
        print(" " * wide + "".join(f"{n[:14]:>15}" for n in names))
        for name, row in zip(names, results[method]["matrix"], strict=True):
            print(f"{name:<{wide}}" + "".join(f"{'' if s != s else f'{s:.1f}':>15}" for s in row))
    if single:
        print("\nalone".ljust(wide + 1) + "".join(f"{s:>15.1f}" for s in single))
    print(TERMS)
    print(f"\n{'method':<18}{'AP':>8}{'F.Ra':>8}{'FWT':>8}{'BWT':>8}{'routing %':>12}")
    for method in methods:
        values = summary(results[method]["matrix"], single)
        line = "".join(f"{'-' if v is None else f'{v:.1f}':>8}" for v in values.values())
        routing = results[method].get("routing")
        print(f"{method:<18}{line}{'-' if routing is None else f'{sum(routing) / len(routing):.1f}':>12}")


def reload_and_answer(bench: Bench, folder: Path) -> None:
    """Load the saved pool on a fresh base model and answer a prompt of the first task, which nobody names."""
    model = PeftModel.from_pretrained(bench.fresh(), folder)
    first = next(iter(bench.stream))
    row = bench.stream[first][bench.split][0]
    print(f"\nReloaded pool with tasks {model.tasks}. A prompt of {first!r}:\n  {str(row['input'])[:300]}")
    print(f"  answer: {answers(bench, model, [row])[0]!r}, expected: {row['output'][0]!r}")


def tell_the_plan(bench: Bench, args: Any) -> None:
    """Say what will be done, and on the made-up tasks how long it takes about."""
    say(f"{len(bench.stream)} tasks: {', '.join(bench.stream)}; methods: {', '.join(args.methods)}")
    if args.tasks_dir is None and args.dataset is None and not args.quick and set(args.methods) <= PASSES.keys():
        minutes = seconds_of_a_pass(bench.base) * sum(PASSES[method] for method in args.methods) / 60
        say(f"about {minutes:.1f} minutes in all at the speed of now")


def programs() -> str:
    """The folder of this interpreter's programs as one would type it: "" where the shell knows it."""
    found = Path(sys.executable).parent
    return f"{found.relative_to(Path.cwd())}{os.sep}" if found.is_relative_to(Path.cwd()) else ""


def failures(results: dict[str, Any]) -> list[str]:
    """What the quickstart promises and did not keep."""
    sequential, sapt = summary(results["sequential"]["matrix"], None), summary(results["sapt"]["matrix"], None)
    routing = sum(results["sapt"]["routing"]) / len(results["tasks"])
    checks = {
        "sequential LoRA forgets: F.Ra >= 20": sequential["F.Ra"] >= 20,
        "SAPT does not forget: F.Ra <= 5": sapt["F.Ra"] <= 5,
        "SAPT's AP is at least 15 points higher": sapt["AP"] >= sequential["AP"] + 15,
        "SAPT routes at least 95 % of prompts to their own block": routing >= 95,
    }
    return [text for text, kept in checks.items() if not kept]


def main() -> int:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["sequential", "per-task", "sapt"])
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"))
    parser.add_argument("--quick", action="store_true", help="a reduced run that only shows that everything works")
    args, begun = parser.parse_args(), time.perf_counter()
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        parser.error(f"There is no method {unknown}: choose among {list(METHODS)}.")
    say(choose_threads())
    bench = set_up(args, args.out, args.quick)
    tell_the_plan(bench, args)
    settings = {
        "budget": asdict(bench.budget),
        "style": asdict(bench.style),
        "split": args.split,
        "metric": args.metric,
    }
    results: dict[str, Any] = {"tasks": list(bench.stream), "settings": settings, "seconds": {}}
    pool = None
    for number, method in enumerate(args.methods, start=1):
        started = time.perf_counter()
        say(f"{number} of {len(args.methods)}: {method}, {ABOUT.get(method, 'a method of the benchmark')}")
        if method in RECIPES:
            model, arm, results[method] = learn_pool(bench, RECIPES[method])
            pool = args.out / "pool"
            if args.tasks_dir is None and args.dataset is None:  # made up: they may be shown
                for name, splits in bench.stream.items():
                    prompt = bench.tokenizer.decode(bench.prompts(splits["train"][:1])[0])
                    model.record_task(name, example=prompt)
            model.save_pretrained(pool)
            if arm is not None:
                arm.save_replay(pool)
            draw_heatmaps(results["tasks"], results[method], args.out / "attention.png")
        else:
            results[method] = learn_stream(METHODS[method](bench))
        results["seconds"][method] = time.perf_counter() - started
        say(f"{method} done in {results['seconds'][method]:.0f} s")
        (args.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    show(results)
    if pool is not None:
        reload_and_answer(bench, pool)
    print(f"\nWritten to {args.out}: results.json, attention.png, pool/ ({time.perf_counter() - begun:.0f} s)")
    if pool is not None:
        print(NEXT.format(pool=pool, here=programs()))
    if args.tasks_dir is not None or args.quick or not {"sequential", "sapt"} <= set(results):
        return 0
    broken = failures(results)
    for text in broken:
        print(f"NOT MET: {text}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
