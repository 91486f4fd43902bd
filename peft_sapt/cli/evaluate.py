"""``peft-sapt eval``: what a saved pool, or any PEFT adapter, scores on tasks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..continual.options import Budget, Data
from ..errors import PoolFormatError
from ..storage.atomic import write_atomically
from .benching import described_stream, resolved, stream_and_orders
from .options import as_yaml, left_to_default, takes

if TYPE_CHECKING:
    from peft import PeftModel

    from ..continual.learner import Bench


@click.command("eval")
@click.argument("folder")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the scores")
@click.option("--dry-run", is_flag=True, help="Show settings and tasks; score nothing.")
@click.pass_context
def command(ctx: click.Context, folder: str, out: Path | None, dry_run: bool, **_: Any) -> None:
    """Score a pool or adapter on the tasks of --tasks-dir, without naming them, and show the routing.

    FOLDER is one that save_pretrained has written, or an id on the Hub. The base model is the one that it names,
    unless --model gives another.
    """
    from peft import PeftModel

    from ..continual.grid import text_of
    from ..continual.settings import make_bench

    data, budget = resolved(ctx)
    if left_to_default(ctx, "model"):
        data.model = base_of(folder)
    stream, _orders = stream_and_orders(data, ["listed"])
    if dry_run:
        click.echo(f"{as_yaml(data, budget)}\n{len(stream)} tasks:\n{described_stream(stream)}")
        return
    with tempfile.TemporaryDirectory() as work:
        bench = make_bench(data, budget, Path(work), stream)
        model = PeftModel.from_pretrained(bench.base, folder)
        scores = {name: of_task(bench, model, name) for name in stream}
    columns = list(next(iter(scores.values())))
    wide = max(map(len, scores)) + 2
    click.echo(" " * wide + "".join(f"{column:>14}" for column in columns))
    for name, row in scores.items():
        click.echo(
            f"{name:<{wide}}" + "".join(f"{'-' if v is None or v != v else f'{v:.2f}':>14}" for v in row.values())
        )
    if out is not None:
        write_atomically(out, text_of({"folder": folder, "scores": scores}))


def base_of(folder: str) -> str:
    """The base model that an adapter's config names; raises [`PoolFormatError`] if there is none."""
    from peft import PeftConfig

    try:
        name = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except (OSError, ValueError) as error:
        raise PoolFormatError(
            f"{folder} holds no adapter_config.json: give a folder of save_pretrained, or an id on the Hub."
        ) from error
    except KeyError as error:
        raise PoolFormatError(f"{folder}/adapter_config.json cannot be read: {error!r}.") from error
    if not name:
        raise PoolFormatError(f"{folder}/adapter_config.json names no base model: give it with --model.")
    return name


def of_task(bench: Bench, model: PeftModel, name: str) -> dict[str, float | None]:
    """Score, score with answers held to the task's labels, and how a pool with that task routes its prompts."""
    from ..continual.answering import answers, mean_score, scored_rows, weights_of_prompts
    from ..continual.method import labels_of
    from ..continual.sapt import percent_led, percent_left

    rows, labels = scored_rows(bench, name), labels_of(bench, name)
    found: dict[str, float | None] = {"score": mean_score(bench, rows, answers(bench, model, rows))}
    held = None if labels is None else mean_score(bench, rows, answers(bench, model, rows, labels=labels))
    found["constrained"] = held
    tasks = getattr(model, "tasks", None)
    if tasks is not None:
        weights = weights_of_prompts(bench, model, name)
        own = tasks.index(name) if name in tasks else None
        led = None if own is None else percent_led(weights, own)
        found |= {"routing %": led, "own weight": None if own is None else float(weights[:, own].mean())}
        found["left to base %"] = percent_left(weights)
    return found


takes(Data, Budget)(command)
