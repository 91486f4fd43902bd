"""The replay rows in a saved pool, by task: what tells the texts of one pool from those of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..errors import PoolFormatError
from .atomic import write_atomically
from .manifest import digest, read_manifest
from .plain_file import is_manifest, opened

NOTE = "rows.json"  # beside the texts: by task, the digest of the rows that its text stands for


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


def digests(rows: Mapping[str, Tensor]) -> dict[str, str]:
    """What tells the replay ``rows`` [n, d] of each task from all others, whatever their dtype."""
    return {name: digest(tensor.float()) for name, tensor in rows.items()}


def note_rows(folder: Path, rows: Mapping[str, Tensor]) -> None:
    """Note in a ``folder`` of texts whose rows each of them stands for."""
    noted = {name: value for name, value in digests(rows).items() if (folder / f"{name}.jsonl").is_file()}
    if noted:
        write_atomically(folder / NOTE, (json.dumps({**noted_rows(folder), **noted}, sort_keys=True) + "\n").encode())


def noted_rows(folder: Path) -> dict[str, str]:
    """What [`note_rows`] noted in ``folder``; nothing where there is no readable note."""
    try:
        found = json.loads((folder / NOTE).read_bytes())
    except (OSError, RecursionError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}
