"""What makes the weights file of a pool describe itself: a manifest of tasks and digests, stored as one more tensor.

PEFT writes ``adapter_model.safetensors`` with fixed metadata, so the manifest is inside as a uint8 tensor of JSON.
The weights file is the commit point of a save: where it and ``adapter_config.json`` disagree, loading refuses by name.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from .config import SaptConfig
from .errors import PoolFormatError

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


def build_manifest(config: SaptConfig, committed: list[bool], tensors: dict[str, Tensor]) -> Tensor:
    """The manifest of a pool as a uint8 tensor of JSON; ``tensors`` by the names they have in the file."""
    values = {
        "format_version": FORMAT_VERSION,
        "tasks": config.tasks,
        "ranks": config.task_ranks,
        "scalings": config.scalings,
        "replay_rows": config.replay_rows,
        "committed": committed,
        "token_dim": config.token_dim,
        "sha256": {plain_name(name): digest(tensor) for name, tensor in sorted(tensors.items())},
    }
    return torch.frombuffer(bytearray(json.dumps(values, sort_keys=True).encode()), dtype=torch.uint8).clone()


def read_manifest(tensor: Tensor) -> dict[str, Any]:
    """Parse a manifest; raises [`PoolFormatError`] if it is not one that this version can read."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > MAX_MANIFEST_BYTES:
        raise PoolFormatError(
            "The pool's manifest is not a uint8 vector of bounded size: the weights file is damaged."
        )
    try:
        values = json.loads(bytes(tensor.cpu().numpy()).decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise PoolFormatError(f"The pool's manifest is not JSON ({error}): the weights file is damaged.") from error
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        raise PoolFormatError("The pool's manifest has no format_version: the weights file is damaged.")
    if values["format_version"] > FORMAT_VERSION:
        raise PoolFormatError(
            f"The pool has format version {values['format_version']}, this peft-sapt reads up to {FORMAT_VERSION}: "
            "upgrade with `pip install -U peft-sapt`."
        )
    if values["format_version"] < 2:
        raise PoolFormatError(
            "The pool has format version 1, of a development version before the first release: train it anew."
        )
    return values


def check_loaded(values: dict[str, Any], config: SaptConfig, tensors: dict[str, Tensor]) -> None:
    """Compare a manifest with the pool that is about to take ``tensors`` (by their names in the file).

    Raises:
        PoolFormatError: tasks, ranks, scalings or replay rows differ from ``config``, or a tensor is missing, foreign
            or changed. Nothing has been loaded then.
    """
    here = {
        "tasks": config.tasks,
        "ranks": config.task_ranks,
        "scalings": config.scalings,
        "replay_rows": config.replay_rows,
        "token_dim": config.token_dim,
    }
    for name, mine in here.items():
        if values.get(name) != mine:
            raise PoolFormatError(
                f"The weights file holds {name} {values.get(name)}, the pool they are loaded into has {mine}. Restore "
                "the adapter_config.json that was saved with these weights, or (resuming a checkpoint) first bring "
                "the pool to the same state with from_pretrained, add_task or reopen_task."
            )
    digests = values.get("sha256")
    if not isinstance(digests, dict):
        raise PoolFormatError("The pool's manifest has no digests: the weights file is damaged.")
    digests = {plain_name(str(name)): value for name, value in digests.items()}
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    missing, foreign = sorted(set(digests) - set(tensors)), sorted(set(tensors) - set(digests))
    if missing or foreign:
        raise PoolFormatError(
            f"The weights file lacks {missing[:5]} and has unknown {foreign[:5]} (first five of each): it is not the "
            "file that was saved."
        )
    changed = [name for name, tensor in tensors.items() if digest(tensor) != digests[name]]
    if changed:
        raise PoolFormatError(
            f"{len(changed)} tensors of the weights file differ from their digest, {changed[0]!r} first: the file was "
            "damaged or edited after it was saved. Load an intact copy."
        )
