"""The group of commands."""

from __future__ import annotations

import os
import warnings

import click

from ..version import __version__
from .lazy import Entry, LazyGroup


class Commands(LazyGroup):
    """All commands."""

    entries = {
        "train": Entry("peft_sapt.cli.train", "Learn a stream of tasks with one method."),
        "eval": Entry("peft_sapt.cli.evaluate", "Score a saved pool or adapter on tasks."),
        "bench": Entry("peft_sapt.cli.bench", "Run methods, orders and seeds over a stream, and report."),
        "report": Entry("peft_sapt.cli.report", "Tables and pictures from the results of bench."),
        "pool": Entry("peft_sapt.cli.pool", "Look into a saved pool.", files_alone=True),
    }


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="peft-sapt")
def main() -> None:
    """Continual learning with a shared attention over LoRA blocks.

    Shell completion: eval "$(_PEFT_SAPT_COMPLETE=bash_source peft-sapt)", or zsh_source, fish_source.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
