"""What the official release saves after each task, read without running anything that is in the files.

Each task has a folder ``<n>-<task>/saved_weights`` with ``lora_weights_A.pt`` and ``lora_weights_B.pt`` (its own
block, and again those of all older tasks, newest first), ``prompts_keys_till_now.pt`` (keys [T, d], newest first),
``trans_input.pt`` (the query projection), and ``attention_weights.pkl`` (mean attention [T] on its own inputs, newest
first, a pickled numpy array). Facts from the release's ``run_llama.py`` at 52a52b9.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OfficialCheckpointError
from .arrays import unpickled

MAX_PICKLE = 2**20
OWN_BLOCK = re.compile(r"^(?P<parent>.+)\.lora_(?P<part>[qv])\.lora_[AB]$")
OLDER_BLOCK = re.compile(r"^(?P<parent>.+)\.previous_lora_weights_(?P<part>[qv])\.(?P<index>\d+)\.lora_[AB]$")
Block = dict[tuple[str, str], Tensor]  # (parent module, "q" or "v") -> factor


@dataclass
class SavedTask:
    """One task's folder: its name, its block as factors A [r, in] and B [out, r], and those of older tasks if they are
    repeated, newest first."""

    name: str
    folder: Path
    a: Block
    b: Block
    older_a: list[Block]
    older_b: list[Block]


def read_attention(path: Path) -> np.ndarray | None:
    """The array in an ``attention_weights.pkl``, float64 [T], newest task first; None if there is no such file.

    Raises:
        OfficialCheckpointError: it is not a pickled vector of finite numbers, or it asks for anything but numpy.
    """
    if not path.exists():
        return None
    data = path.read_bytes()
    if len(data) > MAX_PICKLE:
        raise OfficialCheckpointError(
            f"{path} has {len(data)} bytes, which no pool's attention needs: it is not read."
        )
    try:
        values = unpickled(data)
    except OfficialCheckpointError as error:
        raise OfficialCheckpointError(f"{path} is refused: {error}.") from None
    except Exception as error:  # a pickle can fail in any way
        raise OfficialCheckpointError(f"{path} is not a pickled numpy array ({error!r}).") from error
    if values.ndim != 1 or not np.isfinite(values).all():
        raise OfficialCheckpointError(f"{path} holds an array of shape {values.shape}: attention is a finite vector.")
    return values


def read_tensors(path: Path) -> Any:
    """What torch saved at ``path``, tensors alone; raises [`OfficialCheckpointError`]."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OfficialCheckpointError(f"{path} is missing: give the folder that SAPT's code has written.") from None
    except Exception as error:  # pickle, zip and torch each have errors of their own
        raise OfficialCheckpointError(f"{path} cannot be read as tensors: {str(error).splitlines()[0]}") from error


def read_tasks(outputs: Path) -> list[SavedTask]:
    """The tasks under ``outputs``, oldest first.

    Args:
        outputs: holds ``1-<task>/saved_weights``, ``2-<task>/saved_weights``, ...

    Raises:
        OfficialCheckpointError: there are none, numbers are missing, or a file is not what it should be.
    """
    folders = {}
    for path in outputs.glob("*-*/saved_weights"):
        number, name = path.parent.name.split("-", 1)
        if number.isdigit():
            folders[int(number)] = (name, path)
    if sorted(folders) != list(range(1, len(folders) + 1)) or not folders:
        raise OfficialCheckpointError(
            f"{outputs} should hold 1-<task>/saved_weights, 2-<task>/saved_weights, ...; it has {sorted(folders)}."
        )
    return [read_task(name, path) for _, (name, path) in sorted(folders.items())]


def read_task(name: str, folder: Path) -> SavedTask:
    """One ``saved_weights`` folder; raises [`OfficialCheckpointError`] if its blocks are not as SAPT's code writes."""
    sides = []
    for file in ("lora_weights_A.pt", "lora_weights_B.pt"):
        state = read_tensors(folder / file)
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) and t.dim() == 2 for t in state.values()):
            raise OfficialCheckpointError(f"{folder / file} is no dict of matrices.")
        own: Block = {}
        older: dict[int, Block] = {}
        for key, tensor in state.items():
            if match := OWN_BLOCK.match(key):
                own[match["parent"], match["part"]] = tensor.float()
            elif match := OLDER_BLOCK.match(key):
                older.setdefault(int(match["index"]), {})[match["parent"], match["part"]] = tensor.float()
            else:
                raise OfficialCheckpointError(f"{folder / file} has {key!r}, which is no LoRA of the release.")
        sides.append((own, [older[i] for i in sorted(older)]))
    (a, older_a), (b, older_b) = sides
    if not a or set(a) != set(b) or len(older_a) != len(older_b):
        raise OfficialCheckpointError(f"{folder}: lora_weights_A.pt and lora_weights_B.pt hold different layers.")
    return SavedTask(name, folder, a, b, older_a, older_b)
