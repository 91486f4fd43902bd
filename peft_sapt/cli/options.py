"""Options of a command from the fields of dataclasses, with a YAML file that sets the same fields."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from click.core import ParameterSource

T = TypeVar("T")


class CommaList(click.ParamType):
    """Values of one type, separated by commas on the command line, or a list in YAML."""

    def __init__(self, inner: type) -> None:
        self.inner = inner
        self.name = f"{inner.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not parts or any(part == "" for part in parts):
            self.fail(f"{value!r} is not a list of values separated by commas.", param, ctx)
        kind = click.types.convert_type(self.inner)
        return [kind.convert(part, param, ctx) for part in parts]


def option_of(item: Field, hint: Any) -> click.Option:
    """The option for one field: ``--its-name``, or ``--its-name/--no-its-name`` for a bool."""
    optional = type(None) in typing.get_args(hint)
    if optional:
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    flag, help_text = "--" + item.name.replace("_", "-"), item.metadata.get("help", "")
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if default is MISSING:
        return click.Option([flag], type=kind_of(hint, item), required=True, help=help_text)
    if hint is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=default, show_default=True, help=help_text)
    shown = default not in (None, [])
    return click.Option([flag], type=kind_of(hint, item), default=default, show_default=shown, help=help_text)


def kind_of(hint: Any, item: Field) -> Any:
    choices = item.metadata.get("choices")
    if typing.get_origin(hint) is list:
        return CommaList(typing.get_args(hint)[0])
    if choices:
        return click.Choice(list(choices))
    return click.Path(path_type=Path) if hint is Path else hint


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make the values of a YAML file the command's defaults; flags go before them."""
    if path is None:
        return
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise click.BadParameter(f"{path} holds no options: write lines such as `rows: 96`.")
    known = {p.name for p in ctx.command.params if p.name not in ("config", "dry_run")}
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    for key in values:
        if key not in known:
            near = get_close_matches(key, [name for name in known if name], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" There are {sorted(filter(None, known))}."
            raise click.BadParameter(f"{path} has an unknown option {key!r}.{hint}")
    ctx.default_map = {**(ctx.default_map or {}), **values}


def takes(*classes: type) -> Callable[[click.Command], click.Command]:
    """Add the fields of dataclasses, and ``--config``, to a command, which then gets them all as keyword arguments."""

    def add(command: click.Command) -> click.Command:
        own = []
        for cls in classes:
            hints = typing.get_type_hints(cls)
            own += [option_of(item, hints[item.name]) for item in fields(cls)]
        config = click.Option(
            ["--config"],
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=read_config,
            help="YAML file with any of these options",
        )
        command.params = [config, *command.params, *own]
        return command

    return add


def built(cls: type[T], values: dict[str, Any]) -> T:
    """The dataclass from a command's arguments."""
    return cls(**{item.name: values[item.name] for item in fields(cls)})  # type: ignore[arg-type]  # any dataclass


def left_to_default(ctx: click.Context, name: str) -> bool:
    """Whether neither a flag nor the YAML file has set an option."""
    return ctx.get_parameter_source(name) is ParameterSource.DEFAULT


def as_yaml(*parts: Any) -> str:
    """The values of dataclasses, as a file for ``--config``."""
    values = {item.name: plain(getattr(part, item.name)) for part in parts for item in fields(part)}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
