"""``peft-sapt pool``: look into a saved pool, which needs no base model, and take parts out of it or into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import PoolFormatError
from ..manifest import digest, is_manifest, plain_name, read_manifest
from ..weights_file import opened
from .pool_edit import export, import_, remove


@click.group("pool")
def command() -> None:
    """Look into a saved pool, and take parts out of it or into it."""


@command.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Tasks of the pool in FOLDER, oldest first: rank, scaling, state, replay rows, bytes."""
    tensors, manifest = read_pool(folder)
    size = sum(map(bytes_of, tensors.values()))
    click.echo(f"{folder}: {len(manifest['tasks'])} tasks, {size / 1e6:.2f} MB, format {manifest['format_version']}")
    wide = max([len("task"), *map(len, manifest["tasks"])]) + 2
    click.echo(f"{'task':<{wide}}{'rank':>6}{'scaling':>10}{'replay rows':>13}  state")
    for i, name in enumerate(manifest["tasks"]):
        state = "committed" if manifest["committed"][i] else "open"
        rank, scaling, rows = (manifest[key][i] for key in ("ranks", "scalings", "replay_rows"))
        click.echo(f"{name:<{wide}}{rank:>6}{scaling:>10.3g}{rows:>13}  {state}")


@command.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every tensor of the pool in FOLDER against its digest."""
    click.echo(f"{folder}: {verified(folder)} tensors are what was saved.")


def verified(folder: Path) -> int:
    """The number of tensors of the pool in ``folder``; raises [`PoolFormatError`] if one is not what was saved."""
    tensors, manifest = read_pool(folder)
    known = {plain_name(name): value for name, value in manifest["sha256"].items()}
    here = {plain_name(name): tensor for name, tensor in tensors.items()}
    wrong = sorted(name for name in known.keys() & here.keys() if digest(here[name]) != known[name])
    for what, names in (("missing", known.keys() - here), ("unknown", here.keys() - known), ("changed", wrong)):
        if names:
            raise PoolFormatError(f"{folder}: {len(names)} tensors are {what}, {sorted(names)[0]!r} first.")
    bad = sorted(name for name, t in here.items() if t.is_floating_point() and not bool(t.isfinite().all()))
    if bad:
        raise PoolFormatError(f"{folder}: {len(bad)} tensors hold NaN or infinity, {bad[0]!r} first.")
    return len(here)


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


def read_pool(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a pool but its manifest, and the manifest; raises [`PoolFormatError`] if it is not a pool."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise PoolFormatError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}: give the folder of a saved pool.")
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = [name for name in tensors if is_manifest(name)]
    if len(names) != 1:
        raise PoolFormatError(f"{path} has no pool's manifest: it is not a pool of peft-sapt.")
    return {name: t for name, t in tensors.items() if name != names[0]}, read_manifest(tensors[names[0]])


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


from .pool_push import push  # noqa: E402

for part in (export, import_, remove, push):
    command.add_command(part)
