"""Groups whose commands are imported when they are called: help, completion and looking into files take no torch."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import click

from ..errors import SaptError

AFTER = "after_classes"  # attribute of a callback that [`after_classes`] has made
CLASSES = "peft_sapt.registration"  # imports torch, transformers and PEFT, and makes SAPT a method of PEFT


class Entry(NamedTuple):
    """Where a command is, the line about it, and whether it works on files alone."""

    module: str
    about: str
    files_alone: bool = False
    name: str = "command"


def after_classes(callback: Callable[..., Any]) -> Callable[..., Any]:
    """``callback``, before which SAPT becomes a method of PEFT; its help needs none of it."""

    @wraps(callback)
    def with_classes(*args: Any, **kwargs: Any) -> Any:
        import_module(CLASSES)
        return callback(*args, **kwargs)

    setattr(with_classes, AFTER, True)
    return with_classes


class LazyGroup(click.Group):
    """Imports a command when it is needed, suggests near names, and shows errors of ours without a traceback."""

    entries: dict[str, Entry] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.entries)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.entries:
            return None
        entry = self.entries[name]
        found: click.Command = getattr(import_module(entry.module), entry.name)
        if not entry.files_alone and found.callback is not None and not hasattr(found.callback, AFTER):
            found.callback = after_classes(found.callback)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        asked = bool(args) and not ctx.resilient_parsing  # not to complete what is typed
        if asked and args[0] not in self.entries and not args[0].startswith("-"):
            near = get_close_matches(args[0], self.entries, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint} There are {', '.join(self.entries)}.", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.about) for name, entry in self.entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        names = [name for name in self.entries if name.startswith(incomplete)]
        items = [click.shell_completion.CompletionItem(name, help=self.entries[name].about) for name in names]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SaptError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.filename is None:
                raise
            raise click.ClickException(f"{error.strerror}: {error.filename}") from error
