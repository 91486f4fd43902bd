"""``peft-sapt pool``: look into a saved pool, which needs no base model, and take parts out of it or into it."""

from __future__ import annotations

from pathlib import Path

import click
from torch import Tensor

from ..hub.card_text import CardData, other_prompts
from ..storage.manifest import digest, plain_name
from .pool_edit import export, import_, remove
from .pool_file import read_pool, verified
from .pool_push import push


@click.group("pool")
def command() -> None:
    """Look into a saved pool, and take parts out of it or into it."""


@command.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Tasks of the pool in FOLDER, oldest first: rank, scaling, state, replay rows, prompts in the statistics, bytes;
    and which prompts the base model answers."""
    tensors, manifest = read_pool(folder)
    size = sum(map(bytes_of, tensors.values()))
    click.echo(f"{folder}: {len(manifest['tasks'])} tasks, {size / 1e6:.2f} MB, format {manifest['format_version']}")
    wide = max([len("task"), *map(len, manifest["tasks"])]) + 2
    click.echo(f"{'task':<{wide}}{'rank':>6}{'scaling':>10}{'replay rows':>13}{'statistics of':>15}  state")
    for i, name in enumerate(manifest["tasks"]):
        state = "committed" if manifest["committed"][i] else "open"
        rank, scaling, rows = (manifest[key][i] for key in ("ranks", "scalings", "replay_rows"))
        known = (manifest.get("statistics") or [0] * len(manifest["tasks"]))[i]
        click.echo(f"{name:<{wide}}{rank:>6}{scaling:>10.3g}{rows:>13}{known:>15}  {state}")
    click.echo(other_prompts(CardData(manifest["config"], manifest, None, None, None, folder)).replace("`", ""))


@command.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every tensor of the pool in FOLDER against its digest."""
    click.echo(f"{folder}: {verified(folder)} tensors are what was saved.")


@command.command("diff")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
def diff(first: Path, second: Path) -> None:
    """Compare the pools in FIRST and SECOND: their tasks, and the tensors that differ. Exits with 1 if any do."""
    (tensors, manifest), (other_tensors, other) = read_pool(first), read_pool(second)
    lines = [f"- {name}" for name in manifest["tasks"] if name not in other["tasks"]]
    lines += [f"+ {name}" for name in other["tasks"] if name not in manifest["tasks"]]
    for key in ("tasks", "ranks", "scalings", "replay_rows", "committed", "token_dim", "format_version"):
        if manifest[key] != other[key]:
            lines.append(f"{key}: {manifest[key]} -> {other[key]}")
    here, there = ({plain_name(n): digest(t) for n, t in side.items()} for side in (tensors, other_tensors))
    for what, names in (
        ("only in the first", here.keys() - there.keys()),
        ("only in the second", there.keys() - here.keys()),
        ("changed", {name for name in here.keys() & there.keys() if here[name] != there[name]}),
    ):
        if names:
            lines.append(
                f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''}"
            )
    click.echo("\n".join(lines) or "The pools are equal.")
    if lines:
        raise SystemExit(1)


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


for part in (export, import_, remove, push):
    command.add_command(part)
