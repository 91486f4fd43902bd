"""``peft-sapt pool export | import | remove``: parts out of a pool and into it, on its base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from peft import PeftModel

MODEL = click.option("--model", help="Base model, in place of the one that the pool names.")
CACHE = Path.home() / ".cache" / "peft-sapt"


def opened(folder: Path, model: str | None) -> PeftModel:
    """The pool in ``folder`` on its base model; raises [`PoolFormatError`] or [`StreamError`] where one is missing."""
    from peft import PeftModel

    from ..continual.base import load_base
    from .evaluate import base_of

    base, _ = load_base(base_of(str(folder)) if model is None else model, CACHE, device="cpu")
    return PeftModel.from_pretrained(base, folder)


def must_be_new(out: Path) -> None:
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise click.BadParameter(f"{out} is there already: nothing is overwritten, give a new folder.")


class Shares(click.ParamType):
    """task=weight,task=weight"""

    name = "task=weight,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        try:
            pairs = [part.rsplit("=", 1) for part in str(value).split(",")]
            return {name: float(weight) for name, weight in pairs}
        except ValueError:
            self.fail(f"{value!r} is not of the form agnews=0.7,amazon=0.3.", param, ctx)


@click.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", help="Export this task's block.")
@click.option("--mixture", type=Shares(), help="Export a fixed mixture of blocks.")
@MODEL
def export(folder: Path, out: Path, task: str | None, mixture: dict[str, float] | None, model: str | None) -> None:
    """Write one task, or a mixture, of the pool in FOLDER to OUT as a plain LoRA adapter (or soft prompt) of PEFT."""
    if (task is None) == (mixture is None):
        raise click.UsageError("Give either --task NAME or --mixture NAME=WEIGHT,...")
    must_be_new(out)
    pool: Any = opened(folder, model)
    if task is not None:
        pool.export_task(task, out)
    else:
        pool.export_mixture(mixture, out)
    click.echo(f"Written: {out}")


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The new task's name.")
@MODEL
def import_(folder: Path, adapter: Path, out: Path, name: str, model: str | None) -> None:
    """Take the plain LoRA (or soft prompt) in ADAPTER into the pool in FOLDER, and save it to OUT.

    The task stays open: its key, or its place in a closed-form router, still has to be learned from its prompts.
    """
    changed(folder, out, model, lambda pool: pool.import_task(name, adapter))


@click.command("remove")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("task")
@click.argument("out", type=click.Path(path_type=Path))
@MODEL
def remove(folder: Path, task: str, out: Path, model: str | None) -> None:
    """Save the pool in FOLDER without TASK to OUT."""
    changed(folder, out, model, lambda pool: pool.remove_task(task))


def changed(folder: Path, out: Path, model: str | None, change: Callable[[Any], None]) -> None:
    """Save what ``change`` makes of a pool to a new folder; the old one is left as it is."""
    must_be_new(out)
    pool: Any = opened(folder, model)
    change(pool)
    pool.save_pretrained(out)
    click.echo(f"Written: {out}, with the tasks {', '.join(pool.tasks)}")
