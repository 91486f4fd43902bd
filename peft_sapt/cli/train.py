"""``peft-sapt train``: one method over one stream; what it has learned is saved."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..continual.grid import Run, bench_for, is_done, run_one, runs_of, text_of
from ..continual.learner import Budget
from ..continual.methods import LABELS
from ..continual.options import described
from ..continual.results import DIGITS, NAME, metrics_of
from ..continual.settings import Data, make_bench
from ..storage.atomic import write_atomically
from .benching import described_stream, must_be_folder, resolved, stream_and_orders
from .options import as_yaml, built, takes


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
    show(run, result)
    click.echo(f"Results: {path}")
    if (training.out / "model").exists():
        click.echo(f"Model: {training.out / 'model'}")


def show(run: Run, result: dict[str, Any]) -> None:
    """The score matrix and what follows from it."""
    wide = max(map(len, result["tasks"])) + 2
    click.echo("Score in percent on each task (columns) after each stage (rows):")
    click.echo(" " * wide + "".join(f"{name[:12]:>14}" for name in result["tasks"]))
    for name, row in zip(result["tasks"], result["matrix"], strict=True):
        click.echo(f"{name:<{wide}}" + "".join(f"{'' if s != s else f'{s:.1f}':>14}" for s in row))
    found = {name: value for name, value in metrics_of(result, []).items() if value == value}
    click.echo(
        f"{run.method}: " + ", ".join(f"{name} {value:.{DIGITS.get(name, 1)}f}" for name, value in found.items())
    )


takes(Data, Budget, Training)(command)
