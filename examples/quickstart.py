"""Learn a stream of text tasks with sequential LoRA and with SAPT, and compare what is left of each task at the end.

    python examples/quickstart.py                                  # four made-up tasks, SmolLM2-135M, CPU
    python examples/quickstart.py --tasks-dir DIR --model MODEL    # your data, a Hub id or a folder

Writes results.json, attention.png and the pool to --out. Without --tasks-dir it exits with status 1 unless sequential
LoRA forgets (F.Ra >= 20) and SAPT does not (F.Ra <= 5, AP at least 15 points higher, routing >= 95 %).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from learning import Bench, Budget, answers, learn_sapt, learn_sequential, learn_single, load_base
from stream_data import PromptStyle, exact_match, load_folder, rouge_l
from synthetic import make_stream

from peft_sapt import PeftModel
from peft_sapt.continual.metrics import average_performance, backward_transfer, forgetting_rate, forward_transfer


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2", help="Hub id or folder; default: SmolLM2-135M from PyPI")
    parser.add_argument("--tasks-dir", type=Path, help="folder of <task>.{train,validation,test}.jsonl[.gz]")
    parser.add_argument("--order", type=lambda text: text.split(","), help="tasks of the folder, comma separated")
    parser.add_argument("--metric", choices=["exact", "rougeL"], default="exact")
    parser.add_argument("--head", default="{definition}\n", help="text before the input; {definition} is filled in")
    parser.add_argument("--tail", default="\nOutput:", help="text after the input")
    parser.add_argument("--no-definitions", action="store_true", help="leave the task definition out of all prompts")
    parser.add_argument("--max-tokens", type=int, default=96, help="longest prompt; only the input is cut")
    parser.add_argument("--min-input", type=int, default=24, help="tokens of the input that are never cut")
    parser.add_argument("--rows", type=int, help="training rows per task")
    parser.add_argument("--test-rows", type=int, help="rows per task to answer; routing is measured on all")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="split that is scored")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["sequential", "single", "sapt"])
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"))
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "peft-sapt")
    parser.add_argument("--quick", action="store_true", help="a reduced run that only shows that everything works")
    for item in fields(Budget):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=item.default, help=f"default {item.default}")
    return parser


def set_up(args: argparse.Namespace) -> Bench:
    budget = Budget(**{item.name: getattr(args, item.name) for item in fields(Budget)})
    stream = make_stream(args.seed) if args.tasks_dir is None else load_folder(args.tasks_dir, args.order)
    rows, tests = args.rows, args.test_rows
    if args.quick:
        stream = dict(list(stream.items())[:2])
        rows, tests, budget.generator_epochs = 40, 10, 4.0
    for splits in stream.values():
        splits["train"] = splits["train"][:rows]
    style = PromptStyle(args.head, args.tail, not args.no_definitions, args.max_tokens, args.min_input)
    base, tokenizer = load_base(args.model, args.cache)
    score = exact_match if args.metric == "exact" else rouge_l()
    args.out.mkdir(parents=True, exist_ok=True)
    return Bench(base, tokenizer, stream, style, score, budget, args.out, args.split, tests)


def summary(matrix: list[list[float]], single: list[float] | None) -> dict[str, float | None]:
    return {
        "AP": average_performance(matrix),
        "F.Ra": forgetting_rate(matrix),
        "FWT": None if single is None else forward_transfer(matrix, single),
        "BWT": backward_transfer(matrix),
    }


def show(results: dict[str, Any]) -> None:
    """The score matrices and the summary as text."""
    names, single = results["tasks"], results.get("single")
    wide = max(map(len, names)) + 2
    for method in ("sequential", "sapt"):
        if method not in results:
            continue
        print(f"\n{method}: score on each task (columns) after each stage (rows), in percent")
        print(" " * wide + "".join(f"{n[:14]:>15}" for n in names))
        for name, row in zip(names, results[method]["matrix"], strict=True):
            print(f"{name:<{wide}}" + "".join(f"{'' if s != s else f'{s:.1f}':>15}" for s in row))
    if single:
        print("\nalone".ljust(wide + 1) + "".join(f"{s:>15.1f}" for s in single))
    print(f"\n{'method':<18}{'AP':>8}{'F.Ra':>8}{'FWT':>8}{'BWT':>8}{'routing %':>12}")
    for method, label in (("sequential", "sequential LoRA"), ("sapt", "SAPT")):
        if method not in results:
            continue
        values = summary(results[method]["matrix"], single)
        line = "".join(f"{'-' if v is None else f'{v:.1f}':>8}" for v in values.values())
        routing = results[method].get("routing")
        print(f"{label:<18}{line}{'-' if routing is None else f'{sum(routing) / len(routing):.1f}':>12}")


def draw_heatmap(names: list[str], weights: list[list[float]], path: Path) -> None:
    """Mean attention of each task's test prompts (rows) over the blocks of the pool (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 2.2 + 0.9 * len(names)
    figure, axes = pyplot.subplots(figsize=(size + 0.8, size), layout="constrained")
    image = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("block of the pool")
    axes.set_ylabel("test prompts of")
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            axes.text(j, i, f"{weight:.2f}", ha="center", va="center", color="white" if weight > 0.6 else "black")
    axes.set_title("Mean attention weight")
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def reload_and_answer(bench: Bench, folder: Path) -> None:
    """Load the saved pool on a fresh base model and answer a prompt of the first task, which nobody names."""
    model = PeftModel.from_pretrained(bench.fresh(), folder)
    first = next(iter(bench.stream))
    row = bench.stream[first][bench.split][0]
    print(f"\nReloaded pool with tasks {model.tasks}. A prompt of {first!r}:\n  {str(row['input'])[:300]}")
    print(f"  answer: {answers(bench, model, [row])[0]!r}, expected: {row['output'][0]!r}")


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
    args, begun = make_parser(__doc__.splitlines()[0]).parse_args(), time.perf_counter()
    bench = set_up(args)
    path = args.out / "results.json"
    settings = {
        "budget": asdict(bench.budget),
        "style": asdict(bench.style),
        "split": args.split,
        "metric": args.metric,
    }
    results: dict[str, Any] = {"tasks": list(bench.stream), "settings": settings}
    for method in args.methods:
        if method == "sequential":
            results["sequential"] = {"matrix": learn_sequential(bench)}
        elif method == "single":
            known = results.get("sequential")
            results["single"] = learn_single(bench, known and known["matrix"][0][0])
        else:
            model, arm, results["sapt"] = learn_sapt(bench)
            model.save_pretrained(args.out / "pool")
            arm.save_replay(args.out / "pool")
            draw_heatmap(results["tasks"], results["sapt"]["mean_weights"], args.out / "attention.png")
        results["seconds"] = {**bench.seconds, "total": time.perf_counter() - begun}
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
    show(results)
    if "sapt" in results:
        reload_and_answer(bench, args.out / "pool")
    print(f"\nWritten to {args.out}: results.json, attention.png, pool/ ({results['seconds']['total']:.0f} s)")
    if args.tasks_dir is not None or args.quick or not {"sequential", "sapt"} <= set(results):
        return 0
    broken = failures(results)
    for text in broken:
        print(f"NOT MET: {text}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
