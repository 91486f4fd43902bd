"""A pool's weights file without torch: its manifest, and names, dtypes, shapes and bytes of its tensors.

The command line looks into pools by these alone, since importing torch takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, deserialize, safe_open

from ..errors import FormatVersionError, HeaderError, PoolFormatError, TruncatedFileError
from .overrides import accepted

WEIGHTS_NAME = "adapter_model.safetensors"  # as PEFT has it
FORMAT_VERSION = 4
OLDER = {
    1: "had the factors B as [out, r]",
    2: "had one module for both routers and for what is kept of old tasks",
    3: "told prompts apart by other features and kept no statistics of them",
}
MANIFEST = "sapt_manifest"
MAX_MANIFEST_BYTES = 64 * 2**20
CURE = "Load an intact copy."
# what safetensors says of a file whose header and size do not fit together, and what that is to a reader
FAULTS: tuple[tuple[str, type[PoolFormatError], str], ...] = (
    ("header too small", TruncatedFileError, "has too few bytes for a safetensors file"),
    (
        "invalid header length",
        TruncatedFileError,
        "is shorter than the header it claims to have, or no safetensors file",
    ),
    ("incomplete metadata", TruncatedFileError, "is longer or shorter than its header says"),
    (
        "header too large",
        HeaderError,
        "claims a header larger than any pool's: it is no such file, or a trap",
    ),
    (
        "deserializing header",
        HeaderError,
        "has a header that is none of a safetensors file, or describes tensors that it cannot hold",
    ),
)
# names of dtypes in safetensors, and in torch
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}
# of floating-point dtypes: bytes of a number, and bits that are all set in NaN and infinity alone
EXPONENTS = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
    "C64": (4, 0x7F800000),  # two numbers
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),  # which has no infinity
    "F8_E8M0": (1, 0xFF),
}
MINUS_ZERO = {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}  # in which NaN stands in the place of -0
BITS = re.compile(r"\d+")


class Stored(NamedTuple):
    """A tensor as it lies in the file; ``dtype`` as safetensors names it."""

    dtype: str
    shape: list[int]
    data: bytes | bytearray


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Errors of reading the safetensors file ``path``, which is of unknown origin, as ours.

    Raises:
        HeaderError: its header claims to be longer than any pool's, or is none.
        TruncatedFileError: its length is not what its header says.
        PoolFormatError: it cannot be read, or safetensors refuses it.
    """
    try:
        yield
    except SafetensorError as error:
        for words, kind, meaning in FAULTS:
            if words in str(error):
                raise kind(f"{path} {meaning} ({error}). {CURE}") from error
        raise PoolFormatError(f"{path} is not a safetensors file: {error}. {CURE}") from error
    except OSError as error:
        raise PoolFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file of unknown origin, open to read tensors one by one; raises as [`refusing`] does."""
    with refusing(path), safe_open(path, framework=framework) as file:
        yield file


def read_stored(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file of unknown origin; raises as [`refusing`] does."""
    with refusing(path):
        return {name: Stored(t["dtype"], t["shape"], t["data"]) for name, t in deserialize(path.read_bytes())}


def digest_of(dtype: str, shape: Iterable[int], data: Any) -> str:
    """sha256 over dtype (by torch's name), shape and bytes of a tensor."""
    sha = hashlib.sha256(f"{dtype}{list(shape)}".encode())
    sha.update(data)
    return sha.hexdigest()


def stored_digest(stored: Stored) -> str:
    """The digest that the tensor has in memory; raises [`PoolFormatError`] for a dtype that no pool has."""
    if stored.dtype not in DTYPES:
        raise PoolFormatError(f"A tensor has the dtype {stored.dtype}, which no pool has. {CURE}")
    return digest_of(DTYPES[stored.dtype], stored.shape, stored.data)


def bytes_of(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor of ``dtype``, as safetensors names it."""
    width = BITS.search(dtype)
    return math.prod(shape) * (int(width[0]) if width else 8) // 8


def is_finite(stored: Stored) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    import numpy as np

    if stored.dtype in MINUS_ZERO:
        return 0x80 not in bytes(stored.data)
    if stored.dtype not in EXPONENTS:
        return True

    width, exponent = EXPONENTS[stored.dtype]
    bits = np.frombuffer(stored.data, dtype=f"<u{width}")
    return not bool(((bits & exponent) == exponent).any())


def plain_name(name: str) -> str:
    """A tensor's name within the base model: PEFT puts a prefix before it, transformers' own adapters do not."""
    return name.removeprefix("base_model.model.")


def is_manifest(name: str) -> bool:
    """Whether a tensor of this name, with or without its adapter's name, is a manifest."""
    return MANIFEST in name.split(".")


def parse_manifest(text: bytes) -> dict[str, Any]:
    """A manifest from its bytes; raises [`PoolFormatError`] if it is not one that this version can read."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise PoolFormatError(f"The pool's manifest has {len(text)} bytes: the weights file is damaged.")
    try:
        values = json.loads(text.decode())
    except (RecursionError, ValueError) as error:
        raise PoolFormatError(f"The pool's manifest is not JSON ({error}): the weights file is damaged.") from error
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        raise PoolFormatError("The pool's manifest has no format_version: the weights file is damaged.")
    version = values["format_version"]
    if version > FORMAT_VERSION and not accepted("newer_format"):
        raise FormatVersionError(
            f"The pool has format version {version}, this peft-sapt reads up to {FORMAT_VERSION}: install a newer one."
        )
    if version < FORMAT_VERSION:
        raise FormatVersionError(
            f"The pool has format version {version}, of a development version before the first release, which "
            f"{OLDER.get(version, 'is not known')}: train it again."
        )
    return values


class Differences(NamedTuple):
    """Names of tensors that are not as a manifest says, each list sorted."""

    missing: list[str]
    unknown: list[str]
    changed: list[str]


def differences(manifest: Mapping[str, Any], digests: Iterable[tuple[str, str]]) -> Differences:
    """Compare digests of tensors, by the tensors' names, with those in ``manifest``.

    Raises:
        PoolFormatError: the manifest has no digests.
    """
    known = manifest.get("sha256")
    if not isinstance(known, dict):
        raise PoolFormatError("The pool's manifest has no digests: the weights file is damaged.")
    left = {plain_name(str(name)): value for name, value in known.items()}
    unknown, changed = [], []
    for name, found in digests:
        plain = plain_name(name)
        if plain not in left:
            unknown.append(plain)
        elif found != left.pop(plain):
            changed.append(plain)
    return Differences(sorted(left), sorted(unknown), sorted(changed))
