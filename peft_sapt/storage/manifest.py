"""The manifest: one uint8 tensor of JSON inside the weights file, by which a pool's file describes itself.

PEFT writes ``adapter_model.safetensors`` with fixed metadata, so the manifest travels as one more tensor. The weights
file is the commit point of a save: where it and ``adapter_config.json`` disagree, loading refuses by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import (
    ChangedTensorError,
    FormatVersionError,
    HeaderError,
    MissingTensorError,
    NonFiniteError,
    PoolFormatError,
    TruncatedFileError,
    UnknownTensorError,
)
from .fingerprint import Fingerprint
from .overrides import accepted

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
SAID = "it is not the file that was saved. Load an intact copy"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file of unknown origin, open to read tensors one by one.

    Raises:
        HeaderError: its header claims to be longer than any pool's, or is none.
        TruncatedFileError: its length is not what its header says.
        PoolFormatError: it cannot be read, or safetensors refuses it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        for words, kind, meaning in FAULTS:
            if words in str(error):
                raise kind(f"{path} {meaning} ({error}). {CURE}") from error
        raise PoolFormatError(f"{path} is not a safetensors file: {error}. {CURE}") from error
    except OSError as error:
        raise PoolFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


# --- names and digests -----------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes of ``tensor``."""
    flat = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{str(flat.dtype).removeprefix('torch.')}{list(flat.shape)}".encode())
    if flat.numel():
        sha.update(memoryview(flat.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]  # numpy arrays are buffers
    return sha.hexdigest()


def plain_name(name: str) -> str:
    """A tensor's name within the base model: PEFT puts a prefix before it, transformers' own adapters do not."""
    return name.removeprefix("base_model.model.")


def is_manifest(name: str) -> bool:
    """Whether a tensor of this name, with or without its adapter's name, is a manifest."""
    return MANIFEST in name.split(".")


# --- writing ---------------------------------------------------------------------------------------------------------


def build_manifest(
    described: Mapping[str, Any],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base: Fingerprint | None = None,
    attention: list[list[float] | None] | None = None,
) -> Tensor:
    """The manifest of a pool as a uint8 tensor of JSON; nothing that is given is changed.

    Args:
        described: what the file holds, by name: tasks, ranks, scalings, replay_rows, committed, token_dim, statistics.
        config: values of the pool's config, as JSON has them.
        tensors: of the pool, by the names they have in the file.
        base: of the base model, see [`fingerprint`].
        attention: mean weights of what is stored of each task, for readers, see [`stored_attention`].
    """
    core = {
        "format_version": FORMAT_VERSION,
        **described,
        "config": dict(config),
        "sha256": {plain_name(name): digest(tensor) for name, tensor in sorted(tensors.items())},
    }
    save_id = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()[:16]
    return write_manifest({**core, "base": base or {}, "attention": attention, "save_id": save_id})


def write_manifest(values: Mapping[str, Any]) -> Tensor:
    """``values`` as the uint8 tensor of JSON that [`read_manifest`] reads."""
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8).clone()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_manifest(tensor: Tensor) -> dict[str, Any]:
    """Parse a manifest; raises [`PoolFormatError`] if it is not one that this version can read."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > MAX_MANIFEST_BYTES:
        raise PoolFormatError(
            "The pool's manifest is not a uint8 vector of bounded size: the weights file is damaged."
        )
    try:
        values = json.loads(bytes(tensor.cpu().numpy()).decode())
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


def names_in(path: Path) -> list[str]:
    """Names of the tensors in the weights file at ``path``."""
    with opened(path) as file:
        return list(file.keys())


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the weights file at ``path``, read without its other tensors; None if the file has none.

    Raises:
        PoolFormatError: the file is not a safetensors file, or its manifest cannot be read.
    """
    with opened(path) as file:
        name = next((name for name in file.keys() if is_manifest(name)), None)  # noqa: SIM118
        return None if name is None else read_manifest(file.get_tensor(name))


# --- checks ----------------------------------------------------------------------------------------------------------


class Differences(NamedTuple):
    """Names of tensors that are not as a manifest says, each list sorted."""

    missing: list[str]
    unknown: list[str]
    changed: list[str]


def differences(manifest: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> Differences:
    """Compare tensors, one after another, with the digests in ``manifest``.

    Raises:
        PoolFormatError: the manifest has no digests.
    """
    known = manifest.get("sha256")
    if not isinstance(known, dict):
        raise PoolFormatError("The pool's manifest has no digests: the weights file is damaged.")
    left = {plain_name(str(name)): value for name, value in known.items()}
    unknown, changed = [], []
    for name, tensor in tensors:
        plain = plain_name(name)
        if plain not in left:
            unknown.append(plain)
        elif digest(tensor) != left.pop(plain):
            changed.append(plain)
    return Differences(sorted(left), sorted(unknown), sorted(changed))


def other_fields(manifest: Mapping[str, Any], described: Mapping[str, Any]) -> list[str]:
    """Names of what a pool ``described`` (see [`build_manifest`]) has otherwise than the file with this manifest."""
    return [name for name, mine in described.items() if manifest.get(name) != mine]


def check_loaded(manifest: Mapping[str, Any], described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare a manifest with the pool that is about to take ``tensors`` (by their names in the file).

    Args:
        described: of that pool, see [`build_manifest`].

    Raises:
        PoolFormatError: tasks, ranks, scalings or replay rows differ. Nothing has been loaded then.
        MissingTensorError, UnknownTensorError, ChangedTensorError: of the tensors.
    """
    for name in other_fields(manifest, described):
        raise PoolFormatError(
            f"The weights file holds {name} {manifest.get(name)}, the pool they are loaded into has "
            f"{described[name]}. Restore the adapter_config.json that was saved with these weights, or (resuming a "
            "checkpoint) first bring the pool to the same state with from_pretrained, add_task or reopen_task."
        )
    missing, unknown, changed = differences(manifest, tensors.items())
    if missing and not accepted("missing_tensors"):
        raise MissingTensorError(f"The weights file lacks {missing[:5]} (first five of {len(missing)}): {SAID}.")
    if unknown and not accepted("unknown_tensors"):
        raise UnknownTensorError(
            f"The weights file has unknown tensors {unknown[:5]} (first five of {len(unknown)}): {SAID}."
        )
    if changed and not accepted("changed_tensors"):
        raise ChangedTensorError(
            f"{len(changed)} tensors of the weights file differ from their digest, {changed[0]!r} first: the file was "
            f"damaged or edited after it was saved. {CURE}"
        )


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, sorted."""
    return sorted(name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all()))


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises [`NonFiniteError`] if one of ``tensors`` holds NaN or infinity."""
    bad = nonfinite(tensors)
    if bad and not accepted("nonfinite"):
        raise NonFiniteError(
            f"{len(bad)} tensors of the weights file hold NaN or infinity, {bad[0]!r} first: the pool was saved in "
            "that state. Load an earlier checkpoint."
        )
