"""The manifest: one uint8 tensor of JSON inside the weights file, by which a pool's file describes itself.

PEFT writes ``adapter_model.safetensors`` with fixed metadata, so the manifest travels as one more tensor. The weights
file is the commit point of a save: where it and ``adapter_config.json`` disagree, loading refuses by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ChangedTensorError, MissingTensorError, NonFiniteError, PoolFormatError, UnknownTensorError
from .fingerprint import Fingerprint
from .overrides import accepted
from .plain_file import (
    CURE,
    FORMAT_VERSION,
    MAX_MANIFEST_BYTES,
    differences,
    digest_of,
    is_manifest,
    opened,
    parse_manifest,
    plain_name,
)

SAID = "it is not the file that was saved. Load an intact copy"


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes of ``tensor``."""
    flat = tensor.detach().cpu().contiguous()
    data = flat.view(-1).view(torch.uint8).numpy() if flat.numel() else b""
    return digest_of(str(flat.dtype).removeprefix("torch."), flat.shape, data)


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
    return parse_manifest(bytes(tensor.cpu().numpy()))


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
    missing, unknown, changed = differences(manifest, ((name, digest(tensor)) for name, tensor in tensors.items()))
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
