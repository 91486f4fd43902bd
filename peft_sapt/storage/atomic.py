"""Writing a small file so that a reader sees the old content or the new one, never a part."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def read_bounded(path: str | os.PathLike, limit: int = 64 * 2**20) -> str:
    """The UTF-8 text of a file; raises ValueError if it has more than ``limit`` bytes or is no text."""
    size = os.path.getsize(path)
    if size > limit:
        raise ValueError(f"it has {size} bytes, more than the {limit} that are read")
    return Path(path).read_text(encoding="utf-8")


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write ``data`` to ``path`` through a temporary file in the same folder, fsync and rename.

    The file gets the permissions of any new file here: those that the umask leaves of 0o666.

    Raises:
        OSError: the folder is read-only, the disk is full, ...; ``path`` is then as it was, and nothing else is left.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    # not by tempfile, which makes private files: the umask would have to be read, which means to change it
    handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, target)
    except BaseException:
        os.unlink(staged)
        raise


def config_text(values: dict[str, Any]) -> bytes:
    """JSON of a PEFT config as ``adapter_config.json`` has it; sets become sorted lists."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def share(path: Path, like: Path) -> None:
    """Give the file at ``path``, if it is there, the permissions of the file ``like``, which was made again."""
    if path.exists():
        os.chmod(path, os.stat(like).st_mode & 0o777)
