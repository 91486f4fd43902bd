"""``peft-sapt train``: one method over one stream; what it has learned is saved."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..continual.labels import LABELS
from ..continual.options import Budget, Data, described
from ..storage.atomic import write_atomically
from .benching import described_stream, must_be_folder, resolved, stream_and_orders
from .options import as_yaml, built, takes

HARDLY = 5.0  # percent


@dataclass
class Training:
    """The method, and where its model goes."""

    out: Path = described(Path("train-out"), "folder for results.json and model/")
    method: str = described("sapt", "how to learn", tuple(LABELS))
    order: str = described("listed", "listed, reversed, or a benchmark's, such as order3")


@click.command("train")
@click.option("--dry-run", is_flag=True, help="Show settings and tasks; train nothing.")
@click.pass_context
def command(ctx: click.Context, dry_run: bool, **_: Any) -> None:
    """Learn a stream of tasks with one METHOD, score every task after each, and save the pool or the adapters.

    OUT gets results.json with the score matrix, and model/ in PEFT's format.
    """
    from ..continual.grid import bench_for, is_done, run_one, runs_of, text_of
    from ..continual.results import NAME
    from ..continual.settings import make_bench

    (data, budget), training = resolved(ctx), built(Training, ctx.params)
    must_be_folder(training.out, "--out")
    stream, orders = stream_and_orders(data, [training.order])
    [run] = runs_of(training.out.name, [training.method], [training.order], [budget.seed], orders)
    if dry_run:
        click.echo(f"{as_yaml(data, budget, training)}\n{len(stream)} tasks:\n{described_stream(stream)}")
        return
    path = training.out / NAME
    with tempfile.TemporaryDirectory() as work:
        bench = bench_for(make_bench(data, budget, Path(work), stream), run, orders)
        if is_done(path, bench, run):
            click.echo(f"{path} is there already, made with the same settings: nothing to do.")
            return
        training.out.mkdir(parents=True, exist_ok=True)
        result, method = run_one(bench, run, {"model": data.model})
        method.save(training.out / "model")
        write_atomically(path, text_of(result))  # last: its being there says that all is
    show(run.method, result)
    for line in not_learned(result):
        click.echo(line)
    click.echo(f"Results: {path}")
    if (training.out / "model").exists():
        click.echo(f"Model: {training.out / 'model'}")


def show(method: str, result: dict[str, Any]) -> None:
    """The score matrix and what follows from it."""
    from ..continual.results import DIGITS, metrics_of

    wide = max(map(len, result["tasks"])) + 2
    click.echo("Score in percent on each task (columns) after each stage (rows):")
    click.echo(" " * wide + "".join(f"{name[:12]:>14}" for name in result["tasks"]))
    for name, row in zip(result["tasks"], result["matrix"], strict=True):
        click.echo(f"{name:<{wide}}" + "".join(f"{'' if s != s else f'{s:.1f}':>14}" for s in row))
    found = {name: value for name, value in metrics_of(result, []).items() if value == value}
    click.echo(f"{method}: " + ", ".join(f"{name} {value:.{DIGITS.get(name, 1)}f}" for name, value in found.items()))


def not_learned(result: dict[str, Any]) -> list[str]:
    """A line for each task whose answers were hardly ever right when it had just been learned, and what to try."""
    lines = []
    for i, name in enumerate(result["tasks"]):
        free, held = result["matrix"][i][i], result["constrained"][i][i]
        if free >= HARDLY:
            continue
        why, cure = "", "a higher --lr, more --epochs or --rows, or blocks on more --layers"
        if held == held and held >= free + HARDLY:
            why = f", and {held:.0f} % held to its own labels: some skill is there, the format of the answers is not"
            cure = "more --epochs or a higher --lr first; then a --max-answer that a whole label fits into"
        lines.append(f"NOT LEARNED: {name} scores {free:.0f} % right after its training{why}. Try {cure}.")
    return lines


takes(Data, Budget, Training)(command)
