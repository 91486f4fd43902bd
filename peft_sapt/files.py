"""Writing a small file so that a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME


def umask_mode() -> int:
    """The permission bits a newly created file gets here: 0o666 without the bits of the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def read_bounded(path: str | os.PathLike, limit: int = 64 * 2**20) -> str:
    """The UTF-8 text of a file; raises ValueError if it has more than ``limit`` bytes or is no text."""
    size = os.path.getsize(path)
    if size > limit:
        raise ValueError(f"it has {size} bytes, more than the {limit} that are read")
    return Path(path).read_text(encoding="utf-8")


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` through a temporary file in the same folder, fsync and rename.

    Raises:
        OSError: the folder is read-only, the disk is full, ...; ``path`` is then as it was, and nothing else is left.
    """
    target = Path(path)
    handle, staged = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(staged, umask_mode())
        os.replace(staged, target)
    except BaseException:
        os.unlink(staged)
        raise


def config_text(values: dict[str, Any]) -> bytes:
    """JSON of a PEFT config as ``adapter_config.json`` has it; sets become sorted lists."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def share_weights_file(folder: str | os.PathLike) -> None:
    """Give the weights file in ``folder`` the permissions of the umask; safetensors leaves it private."""
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if weights.exists():
        os.chmod(weights, umask_mode())
