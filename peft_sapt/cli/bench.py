"""``peft-sapt bench``: a grid of methods, orders and seeds, resumable, and the report of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..continual.labels import LABELS
from ..continual.options import Budget, Data, described
from .benching import described_stream, must_be_folder, resolved, stream_and_orders
from .options import as_yaml, built, takes


@dataclass
class Grid:
    """The cells, and where their results go."""

    out: Path = described(Path("bench-out"), "folder of results")
    name: str = described("grid", "of this grid: results go to <out>/<name>/")
    methods: list[str] = described(["sequential", "sapt"], "among " + ", ".join(LABELS))
    orders: list[str] = described(["listed"], "listed, reversed, or a benchmark's, such as order3")
    seeds: list[int] = described([0], "of every random choice")
    report: bool = described(True, "write tables and pictures when all runs are there")


@click.command("bench")
@click.option("--dry-run", is_flag=True, help="Show settings, tasks and runs; run nothing.")
@click.pass_context
def command(ctx: click.Context, dry_run: bool, **_: Any) -> None:
    """Run METHODS x ORDERS x SEEDS over a stream of tasks, each run once, and write results.json and a report.

    Resumes wherever it was stopped; several processes started on one folder share the work. Scores of tasks alone,
    which FWT compares with, are measured once for each seed.
    """
    from ..continual.grid import run_grid, runs_of, with_single_scores
    from ..continual.results import write_results
    from ..continual.settings import make_bench

    (data, budget), grid = resolved(ctx), built(Grid, ctx.params)
    must_be_folder(grid.out, "--out")
    if grid.report:
        from ..report.pictures import check_can_draw

        check_can_draw()
    stream, orders = stream_and_orders(data, grid.orders)
    runs = with_single_scores(runs_of(grid.name, grid.methods, grid.orders, grid.seeds, orders), orders)
    if dry_run:
        click.echo(as_yaml(data, budget, grid))
        click.echo(f"{len(stream)} tasks:\n{described_stream(stream)}\n\n{len(runs)} runs:")
        for run in runs:
            click.echo(f"  {'done' if run.path(grid.out).exists() else 'to do'}  {run.path(grid.out)}")
        return
    with tempfile.TemporaryDirectory() as work:
        bench = make_bench(data, budget, Path(work), stream)
        run_grid(bench, runs, grid.out, {"model": data.model}, orders)
    written = write_results(grid.out, runs)
    if written is None:
        click.echo("Some runs are under way in other processes, the last of which writes results.json.")
        return
    click.echo(f"Results: {written}")
    if grid.report:
        from ..report.write import write_report

        click.echo(f"Report: {write_report(written.parent, written.parent / 'report')}")


takes(Data, Budget, Grid)(command)
