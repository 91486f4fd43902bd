"""The weights file of a saved pool, without its base model: what `peft-sapt pool` shows, compares and verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import PoolFormatError
from ..storage.manifest import differences, is_manifest, nonfinite, opened, plain_name, read_manifest


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


def verified(folder: Path) -> int:
    """The number of tensors of the pool in ``folder``; raises [`PoolFormatError`] if one is not what was saved."""
    tensors, manifest = read_pool(folder)
    for what, names in differences(manifest, tensors.items())._asdict().items():
        if names:
            raise PoolFormatError(f"{folder}: {len(names)} tensors are {what}, {names[0]!r} first.")
    bad = nonfinite({plain_name(name): tensor for name, tensor in tensors.items()})
    if bad:
        raise PoolFormatError(f"{folder}: {len(bad)} tensors hold NaN or infinity, {bad[0]!r} first.")
    return len(tensors)
