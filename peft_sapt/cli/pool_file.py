"""``peft-sapt pool show | verify | diff``: what the files of a saved pool tell, without torch and without its base."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from ..errors import PoolFormatError
from ..hub.strangers_text import other_prompts
from ..storage.atomic import read_bounded
from ..storage.plain_file import (
    WEIGHTS_NAME,
    Stored,
    bytes_of,
    differences,
    is_finite,
    is_manifest,
    opened,
    parse_manifest,
    plain_name,
    read_stored,
    stored_digest,
)


def weights_in(folder: Path) -> Path:
    """The weights file in ``folder``; raises [`PoolFormatError`] if there is none."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise PoolFormatError(f"{folder} holds no {WEIGHTS_NAME}: give the folder of a saved pool.")
    return path


def manifest_in(path: Path, names: Iterable[str]) -> str:
    """Which of the tensors' ``names`` in a file is its manifest; raises [`PoolFormatError`] if none is, or several."""
    found = [name for name in names if is_manifest(name)]
    if len(found) != 1:
        raise PoolFormatError(f"{path} has no pool's manifest: it is not a pool of peft-sapt.")
    return found[0]


def read_pool(folder: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors of a pool but its manifest, and the manifest; raises [`PoolFormatError`] if it is not a pool."""
    path = weights_in(folder)
    tensors = read_stored(path)
    manifest = parse_manifest(bytes(tensors.pop(manifest_in(path, tensors)).data))
    return tensors, checked_manifest(path, manifest)


def read_header(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes of each tensor of a pool but its manifest, and the manifest, which alone is read; raises as [`read_pool`]
    does."""
    path = weights_in(folder)
    with opened(path, framework="numpy") as file:
        names = list(file.keys())
        told = manifest_in(path, names)
        manifest = parse_manifest(file.get_tensor(told).tobytes())
        slices = {name: file.get_slice(name) for name in names if name != told}
        sizes = {name: bytes_of(part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return sizes, checked_manifest(path, manifest)


def checked_manifest(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """``manifest``, if it describes its tasks; raises [`PoolFormatError`] if it does not."""
    tasks = manifest.get("tasks")
    lists = [manifest.get(key) for key in ("ranks", "scalings", "replay_rows", "committed")]
    good = (
        isinstance(manifest.get("config"), dict)
        and isinstance(tasks, list)
        and all(isinstance(name, str) for name in tasks)
        and all(isinstance(values, list) and len(values) == len(tasks) for values in lists)
        and all(type(value) in (int, float, bool) for values in lists for value in values or ())
    )
    if not good:
        raise PoolFormatError(f"The manifest in {path} does not describe a pool's tasks: the weights file is damaged.")
    return manifest


def own_config(folder: Path) -> dict[str, Any]:
    """What adapter_config.json alone tells of a pool: the name of its base model, and the records of its tasks."""
    try:
        found = json.loads(read_bounded(folder / "adapter_config.json"))
    except (OSError, RecursionError, ValueError):
        return {}
    found = found if isinstance(found, dict) else {}
    records = found.get("records")
    return {
        "base": found.get("base_model_name_or_path"),
        "records": {k: r for k, r in records.items() if isinstance(r, dict)} if isinstance(records, dict) else {},
    }


def verified(folder: Path) -> int:
    """The number of tensors of the pool in ``folder``; raises [`PoolFormatError`] if one is not what was saved."""
    tensors, manifest = read_pool(folder)
    digests = ((name, stored_digest(stored)) for name, stored in tensors.items())
    for what, names in differences(manifest, digests)._asdict().items():
        if names:
            raise PoolFormatError(f"{folder}: {len(names)} tensors are {what}, {names[0]!r} first.")
    bad = sorted(plain_name(name) for name, stored in tensors.items() if not is_finite(stored))
    if bad:
        raise PoolFormatError(f"{folder}: {len(bad)} tensors hold NaN or infinity, {bad[0]!r} first.")
    return len(tensors)


@click.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
def show(folder: Path) -> None:
    """Tasks of the pool in FOLDER, oldest first: rank, scaling, state, replay rows, prompts in the statistics, bytes;
    and which prompts the base model answers."""
    sizes, manifest = read_header(folder)
    config, own = manifest["config"], own_config(folder)
    click.echo(
        f"{folder}: {len(manifest['tasks'])} tasks, {sum(sizes.values()) / 1e6:.2f} MB, "
        f"format {manifest['format_version']}"
    )
    settings = ", ".join(f"{name} {config.get(name)!r}" for name in ("router", "features", "fallback"))
    click.echo(f"base model {own.get('base')!r}, {settings}")
    wide = max([len("task"), *map(len, manifest["tasks"])]) + 2
    click.echo(f"{'task':<{wide}}{'rank':>6}{'scaling':>10}{'replay rows':>13}{'statistics of':>15}  state")
    for i, name in enumerate(manifest["tasks"]):
        state = "committed" if manifest["committed"][i] else "open"
        rank, scaling, rows = (manifest[key][i] for key in ("ranks", "scalings", "replay_rows"))
        known = (manifest.get("statistics") or [0] * len(manifest["tasks"]))[i]
        click.echo(f"{name:<{wide}}{rank:>6}{scaling:>10.3g}{rows:>13}{known:>15}  {state}")
    for name in manifest["tasks"]:
        example = own.get("records", {}).get(name, {}).get("example")
        if example:
            click.echo(f"a prompt of {name}: {example!r}")
    click.echo(other_prompts({**config, "tasks": manifest["tasks"]}, manifest, as_code=repr).replace("`", ""))


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify(folder: Path) -> None:
    """Check every tensor of the pool in FOLDER against its digest."""
    click.echo(f"{folder}: {verified(folder)} tensors are what was saved.")


@click.command("diff")
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
    here, there = ({plain_name(n): stored_digest(t) for n, t in side.items()} for side in (tensors, other_tensors))
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
