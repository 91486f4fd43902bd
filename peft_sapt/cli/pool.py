"""``peft-sapt pool``: look into a saved pool, which needs no base model, and take parts out of it or into it."""

from __future__ import annotations

import click

from .lazy import Entry, LazyGroup


class PoolCommands(LazyGroup):
    """The commands of ``peft-sapt pool``."""

    entries = {
        "show": Entry("peft_sapt.cli.pool_file", "Tasks, sizes, and who answers other prompts.", True, "show"),
        "verify": Entry("peft_sapt.cli.pool_file", "Check every tensor against its digest.", True, "verify"),
        "diff": Entry("peft_sapt.cli.pool_file", "Compare two pools.", True, "diff"),
        "export": Entry("peft_sapt.cli.pool_edit", "Write one task as a LoRA adapter.", name="export"),
        "import": Entry("peft_sapt.cli.pool_edit", "Take in a LoRA adapter as a task.", name="import_"),
        "remove": Entry("peft_sapt.cli.pool_edit", "Write a pool without a task.", name="remove"),
        "push": Entry("peft_sapt.cli.pool_push", "Send a pool to the Hub.", name="push"),
    }


@click.group("pool", cls=PoolCommands)
def command() -> None:
    """Look into a saved pool, and take parts out of it or into it."""
