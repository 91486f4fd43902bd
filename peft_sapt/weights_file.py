"""Opening a safetensors file of unknown origin: its size and header are checked before anything believes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import HeaderError, PoolFormatError, TruncatedFileError

MAX_HEADER = 64 * 2**20  # bytes; a pool of 1000 tasks on 100 layers has about one
CURE = "Load an intact copy."


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open to read tensors one by one.

    Raises:
        HeaderError: its header claims to be longer than any pool's, or is none.
        TruncatedFileError: it ends before its last tensor.
        PoolFormatError: it cannot be read, or safetensors refuses it.
    """
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise PoolFormatError(f"{path} is not a safetensors file: {error}. {CURE}") from error
    except OSError as error:
        raise PoolFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def check_header(path: Path) -> None:
    """Compare what the header of the file at ``path`` claims with the file's size."""
    size = os.path.getsize(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise TruncatedFileError(f"{path} has {size} bytes, too few for a safetensors file. {CURE}")
        if length > MAX_HEADER:
            raise HeaderError(
                f"{path} claims a header of {length} bytes, more than the {MAX_HEADER} that a pool could have: it is "
                f"not a safetensors file, or made to exhaust memory. {CURE}"
            )
        if length > size - 8:
            raise TruncatedFileError(f"{path} ends within its header, after {size} bytes. {CURE}")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            needed = 8 + length + max(ends, default=0)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise HeaderError(
                f"{path} has no header of a safetensors file ({type(error).__name__}). {CURE}"
            ) from error
    if not isinstance(needed, int) or needed > size:
        raise TruncatedFileError(f"{path} has {size} bytes of {needed}: it was cut short. {CURE}")
