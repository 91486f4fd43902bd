"""A pickled vector of floats, read without numpy's own unpickling, which believes what a file claims."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from ..errors import OfficialCheckpointError

FLOATS = ("f2", "f4", "f8")
MAX_ITEMS = 2**17


STEPS = frozenset(  # of pickles that hold an array of floats, in protocols 0 to 5
    [
        *(
            "PROTO",
            "FRAME",
            "STOP",
            "MARK",
            "GLOBAL",
            "STACK_GLOBAL",
            "REDUCE",
            "BUILD",
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
        ),
        *(
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
            "EMPTY_TUPLE",
            "INT",
            "LONG",
            "LONG1",
            "BININT",
            "BININT1",
            "BININT2",
        ),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES"),
        *("SHORT_BINBYTES", "BYTEARRAY8", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    ]
)


class Dtype:
    """What ``numpy.dtype`` is pickled as: a name, then a state that begins with version and byte order."""

    def __init__(self, name: object, *_: object) -> None:
        if not isinstance(name, str) or name.lstrip("<=|") not in FLOATS:
            raise OfficialCheckpointError(f"the pickle has numbers of type {str(name)[:20]!r}, not floats")
        self.name = name.lstrip("<=|")

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", "=", "|"):
            raise OfficialCheckpointError(f"the pickle has numbers in byte order {str(order)[:20]!r}, not '<'")


class Array:
    """What ``numpy.ndarray`` is pickled as: an empty one, then a state of version, shape, type, order and bytes."""

    values: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise OfficialCheckpointError("the pickle's array has no state of an array")
        _, shape, kind, _, data = state
        self.values = vector(data, kind, shape)


def vector(data: object, kind: object, shape: object) -> np.ndarray:
    """``data`` as floats of ``kind``, float64 [n]; raises [`OfficialCheckpointError`] where the three do not fit."""
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if not all(type(size) is int and 0 <= size <= MAX_ITEMS for size in sizes) or len(sizes) > 8:
        raise OfficialCheckpointError(f"the pickle's array claims the shape {str(shape)[:40]}")
    raw = data.encode("latin1", "replace") if isinstance(data, str) else data  # protocols 0 to 2 write text
    if not isinstance(kind, Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise OfficialCheckpointError("the pickle's array has no bytes of a float type")
    if len(raw) != math.prod(sizes) * int(kind.name[1]):
        found = f"{len(raw)} bytes, which are not {str(shape)[:40]} of {kind.name}"
        raise OfficialCheckpointError(f"the pickle's array has {found}")
    return np.frombuffer(bytes(raw), dtype=f"<{kind.name}").astype(np.float64).reshape(sizes)


def reconstruct(*_: object) -> Array:
    """Stands for ``numpy.core.multiarray._reconstruct``."""
    return Array()


def from_buffer(data: object, kind: object, shape: object, order: object = "C") -> Array:
    """Stands for ``numpy.core.numeric._frombuffer``, of protocol 5."""
    found = Array()
    found.values = vector(bytes(data) if isinstance(data, pickle.PickleBuffer) else data, kind, shape)
    return found


def encode(text: object, encoding: object = "latin1") -> bytes:
    """Stands for ``_codecs.encode``, by which old protocols write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise OfficialCheckpointError("the pickle encodes something else than bytes")
    return text.encode("latin1", "replace")


STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): Dtype,
    ("_codecs", "encode"): encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): from_buffer for core in ("core", "_core")},
}


class ArraysOnly(pickle.Unpickler):
    """An unpickler that knows the names above, as stand-ins that check what they get, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise OfficialCheckpointError(f"the pickle asks for {module}.{name}, where only a numpy array may be")
        return STAND_INS[module, name]


def check_steps(data: bytes) -> None:
    """Look at each step of a pickle before any is taken: only those that numpy's pickles have, no memo out of bounds.

    Raises:
        OfficialCheckpointError: it has another step. ValueError: it is no pickle.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in STEPS:
            raise OfficialCheckpointError(f"the pickle has the step {opcode.name}, which no array needs")
        if opcode.name.endswith(("PUT", "GET")) and not 0 <= int(argument or 0) < len(data):
            raise OfficialCheckpointError("the pickle has a memo out of bounds")


def unpickled(data: bytes) -> np.ndarray:
    """The array in ``data``, float64.

    Raises:
        OfficialCheckpointError: it asks for anything else, or does not fit together.
        Exception: it is no pickle; a pickle can fail in any way.
    """
    check_steps(data)
    found = ArraysOnly(io.BytesIO(data)).load()
    values = found.values if isinstance(found, Array) else None
    if values is None:
        raise OfficialCheckpointError(f"the pickle holds a {type(found).__name__}, not an array")
    return values
