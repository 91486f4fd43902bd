"""What the weights file of a pool says of itself, written at a save and compared at a load."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import SaptConfig
from .errors import PoolFormatError
from .fingerprint import Fingerprint
from .manifest import FORMAT_VERSION, digest, plain_name, write_manifest


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
    return write_manifest(
        {
            "format_version": FORMAT_VERSION,
            "tasks": config.tasks,
            "ranks": config.task_ranks,
            "scalings": config.scalings,
            "replay_rows": config.replay_rows,
            "committed": committed,
            "token_dim": config.token_dim,
            "base": base or {},
            "attention": attention,
            "sha256": {plain_name(name): digest(tensor) for name, tensor in sorted(tensors.items())},
        }
    )


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
