"""The replay rows in a saved pool, by task: what tells the texts of one pool from those of another."""

from __future__ import annotations

from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import PoolFormatError
from .manifest import is_manifest, opened, read_manifest


def stored_replay(folder: Path) -> dict[str, Tensor] | None:
    """Pooled replay rows [n, d] of each task of the pool saved in ``folder``; None if there is none to read."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return None
    try:
        with opened(path) as file:
            names = list(file.keys())
            manifest = read_manifest(file.get_tensor(next(filter(is_manifest, names))))
            key = next((name for name in names if ".sapt_replay." in name), None)
            if key is None:
                return {}
            return dict(zip(manifest["tasks"], file.get_tensor(key).split(manifest["replay_rows"]), strict=True))
    except (KeyError, PoolFormatError, RuntimeError, StopIteration, TypeError, ValueError):
        return None
