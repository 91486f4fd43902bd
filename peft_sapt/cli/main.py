"""The group of commands, and how errors reach the user."""

from __future__ import annotations

import os
import warnings
from difflib import get_close_matches
from typing import Any

import click

from ..errors import SaptError
from ..version import __version__

COMMANDS = {  # each is imported when it is called, so that --help and completion need no torch
    "train": ("peft_sapt.cli.train", "Learn a stream of tasks with one method."),
    "eval": ("peft_sapt.cli.evaluate", "Score a saved pool or adapter on tasks."),
    "bench": ("peft_sapt.cli.bench", "Run methods, orders and seeds over a stream, and report."),
    "report": ("peft_sapt.cli.report", "Tables and pictures from the results of bench."),
    "pool": ("peft_sapt.cli.pool", "Look into a saved pool."),
}


class Commands(click.Group):
    """Imports a command when it is needed, suggests near names, and shows errors of ours without a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        from importlib import import_module

        return import_module(COMMANDS[name][0]).command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint} There are {', '.join(COMMANDS)}.", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaptError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise click.ClickException(f"{error.strerror}: {error.filename}") from error


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peft-sapt")
def main() -> None:
    """Continual learning with a shared attention over LoRA blocks.

    Shell completion: eval "$(_PEFT_SAPT_COMPLETE=bash_source peft-sapt)", or zsh_source, fish_source.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
