"""What the weights file of a pool says of itself, written at a save and compared at a load."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from .config import SaptConfig
from .errors import ChangedTensorError, MissingTensorError, NonFiniteError, PoolFormatError, UnknownTensorError
from .fingerprint import Fingerprint
from .manifest import FORMAT_VERSION, digest, plain_name, write_manifest
from .overrides import accepted


def build_manifest(
    config: SaptConfig,
    committed: list[bool],
    tensors: dict[str, Tensor],
    base: Fingerprint | None = None,
    attention: list[list[float] | None] | None = None,
) -> Tensor:
    """The manifest of a pool as a uint8 tensor of JSON.

    Args:
        tensors: of the pool, by the names they have in the file.
        base: of the base model, see [`fingerprint`].
        attention: mean weights of what is stored of each task, for readers, see [`stored_attention`].
    """
    values = {
        "format_version": FORMAT_VERSION,
        "tasks": config.tasks,
        "ranks": config.task_ranks,
        "scalings": config.scalings,
        "replay_rows": config.replay_rows,
        "committed": committed,
        "token_dim": config.token_dim,
        "base": base or {},
        "attention": attention,
        "config": config.describing(),
        "sha256": {plain_name(name): digest(tensor) for name, tensor in sorted(tensors.items())},
    }
    core = {name: value for name, value in values.items() if name not in ("base", "attention")}
    config.generation = hashlib.sha256(json.dumps(core, sort_keys=True).encode()).hexdigest()[:16]
    return write_manifest({**values, "generation": config.generation})


def check_loaded(values: dict[str, Any], config: SaptConfig, tensors: dict[str, Tensor]) -> None:
    """Compare a manifest with the pool that is about to take ``tensors`` (by their names in the file).

    Raises:
        PoolFormatError: tasks, ranks, scalings or replay rows differ from ``config``. Nothing has been loaded then.
        MissingTensorError, UnknownTensorError, ChangedTensorError: of the tensors.
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
    said = "it is not the file that was saved. Load an intact copy"
    if missing and not accepted("missing_tensors"):
        raise MissingTensorError(f"The weights file lacks {missing[:5]} (first five of {len(missing)}): {said}.")
    if foreign and not accepted("unknown_tensors"):
        raise UnknownTensorError(
            f"The weights file has unknown tensors {foreign[:5]} (first five of {len(foreign)}): {said}."
        )
    changed = [name for name, tensor in tensors.items() if name in digests and digest(tensor) != digests[name]]
    if changed and not accepted("changed_tensors"):
        raise ChangedTensorError(
            f"{len(changed)} tensors of the weights file differ from their digest, {changed[0]!r} first: the file was "
            "damaged or edited after it was saved. Load an intact copy."
        )


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raises [`NonFiniteError`] if one of ``tensors`` holds NaN or infinity."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad and not accepted("nonfinite"):
        raise NonFiniteError(
            f"{len(bad)} tensors of the weights file hold NaN or infinity, {bad[0]!r} first: the pool was saved in "
            "that state. Load an earlier checkpoint."
        )
