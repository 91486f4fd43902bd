"""The manifest: one uint8 tensor of JSON inside the weights file, by which a pool's file describes itself.

PEFT writes ``adapter_model.safetensors`` with fixed metadata, so the manifest travels as one more tensor. The weights
file is the commit point of a save: where it and ``adapter_config.json`` disagree, loading refuses by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import FormatVersionError, PoolFormatError
from .overrides import accepted
from .weights_file import opened

FORMAT_VERSION = 2  # 1 had the factors B as [out, r]; it was never released
MANIFEST = "sapt_manifest"
MAX_MANIFEST_BYTES = 64 * 2**20


def digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes of ``tensor``."""
    flat = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{str(flat.dtype).removeprefix('torch.')}{list(flat.shape)}".encode())
    if flat.numel():
        sha.update(memoryview(flat.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return sha.hexdigest()


def plain_name(name: str) -> str:
    """A tensor's name within the base model: PEFT puts a prefix before it, transformers' own adapters do not."""
    return name.removeprefix("base_model.model.")


def is_manifest(name: str) -> bool:
    """Whether a tensor of this name, with or without its adapter's name, is a manifest."""
    return MANIFEST in name.split(".")


def write_manifest(values: dict[str, Any]) -> Tensor:
    """``values`` as the uint8 tensor of JSON that [`read_manifest`] reads."""
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8).clone()


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
    if values["format_version"] > FORMAT_VERSION and not accepted("newer_format"):
        raise FormatVersionError(
            f"The pool has format version {values['format_version']}, this peft-sapt reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U peft-sapt`."
        )
    if values["format_version"] < 2:
        raise FormatVersionError(
            "The pool has format version 1, of a development version before the first release: train it anew."
        )
    return values


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The manifest of the weights file at ``path``, read without its other tensors; None if the file has none.

    Raises:
        PoolFormatError: the file is not a safetensors file, or its manifest cannot be read.
    """
    with opened(path) as file:
        name = next((name for name in file.keys() if is_manifest(name)), None)  # noqa: SIM118
        return None if name is None else read_manifest(file.get_tensor(name))
