"""What train, eval and bench share: options resolved against a benchmark, and the stream they ask for."""

from __future__ import annotations

from pathlib import Path

import click

from ..continual.benchmarks import BENCHMARKS, tasks_in_order
from ..continual.options import Budget, Data
from ..continual.streams import Stream
from ..errors import StreamError
from .options import built, left_to_default


def resolved(ctx: click.Context) -> tuple[Data, Budget]:
    """Data and budget of a command; what was not set comes from the benchmark, if one is named."""
    data, budget = built(Data, ctx.params), built(Budget, ctx.params)
    if data.benchmark is not None:
        known = BENCHMARKS[data.benchmark]
        for target, names in ((data, ("head", "tail", "metric")), (budget, ("max_answer",))):
            for name in names:
                if left_to_default(ctx, name):
                    setattr(target, name, getattr(known, name))
    data.check()
    return data, budget


def stream_and_orders(data: Data, wanted: list[str]) -> tuple[Stream, dict[str, list[str]]]:
    """The tasks of all ``wanted`` orders, and every order that can be asked for by name.

    "listed" and "reversed" are of ``data.tasks``, or of all tasks there; the others are a benchmark's.
    """
    from ..continual.grid import orders_of
    from ..continual.settings import available, load_stream, named_orders

    named = named_orders(data)
    skip = data.missing == "skip"
    if data.tasks is not None and any(name in named for name in wanted):
        raise StreamError(f"--tasks and a benchmark's order ({wanted}) were both given: choose one.")
    orders = {name: tasks_in_order(named[name], available(data), skip) for name in named if name in wanted}
    for name, found in orders.items():
        if len(found) < len(named[name]):
            click.echo(f"{name} is a sub-stream: {len(found)} of its {len(named[name])} tasks are there.", err=True)
    if all(name in named for name in wanted):
        names = list(dict.fromkeys(name for order in wanted for name in orders[order]))
        data.tasks = names
    stream = load_stream(data)
    return stream, {**orders_of(list(stream)), **orders, **{n: [] for n in named if n not in orders}}


def described_stream(stream: Stream) -> str:
    """One line a task: rows by split."""
    wide = max(map(len, stream))
    return "\n".join(
        f"  {name:<{wide}}  " + ", ".join(f"{split} {len(rows)}" for split, rows in splits.items())
        for name, splits in stream.items()
    )


def must_be_folder(path: Path, what: str) -> None:
    if path.exists() and not path.is_dir():
        raise click.BadParameter(f"{path} is a file: {what} needs a folder.")
