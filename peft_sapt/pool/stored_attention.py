"""What a pool's attention says of the prompts it keeps: one row per task, computed from the saved tensors alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import SaptConfig
from ..routing import ROUTERS
from ..routing.memory import MEMORY
from ..routing.moments import Moments
from ..routing.router import stacked, state_key
from ..routing.statistics import STATISTICS

DRAWN = 64  # of each task's prompts, by its statistics
MAX_TASKS = 50  # beyond which nobody reads the matrix, and its T^2 numbers would outgrow what they describe


@torch.no_grad()
def stored_attention(config: SaptConfig, tensors: Mapping[str, Tensor]) -> list[list[float] | None] | None:
    """Mean attention of each task's stored prompts over the blocks, [T][T], rounded to four digits.

    What is stored of a task are its replay rows, its statistics, or what its router keeps of it. A task of which
    nothing is stored has None for a row.

    Args:
        tensors: of the pool by their names in the file, whole.

    Returns:
        None where the pool has more than ``MAX_TASKS`` tasks, or its tensors are not here.
    """
    router = ROUTERS[config.router]
    state, memory = state_in(tensors, router.module_name), state_in(tensors, MEMORY)
    if len(config.tasks) > MAX_TASKS or not state or any(t.device.type == "meta" for t in state.values()):
        return None
    replay = memory.get("sapt_replay")
    stored = [None] * len(config.tasks) if replay is None else replay.split(config.replay_rows)
    drawn = draws_in(config, state_in(tensors, STATISTICS))
    rows = [draw if own is None or not len(own) else own for own, draw in zip(stored, drawn, strict=True)]
    found = router.stored_weights(state, config, rows)
    return [None if row is None else [round(value, 4) for value in row.tolist()] for row in found]


def draws_in(config: SaptConfig, state: Mapping[str, Tensor]) -> list[Tensor]:
    """Draws [n, d] in place of each task's prompts, by the statistics in a file; none of a task without."""
    found, size = [], config.statistics_rank + 2
    if "sapt_statistics" not in state or "sapt_counts" not in state:
        return [torch.zeros(0, config.feature_dim or 0) for _ in config.tasks]
    parts = stacked(state, "sapt_statistics", "sapt_old_statistics").split(size)
    for part, count in zip(parts, state["sapt_counts"][:, 0].tolist(), strict=True):
        own = Moments(part[0], part[1], part[2:], int(count))
        found.append(own.draws(DRAWN if count else 0, torch.Generator().manual_seed(0)))
    return found


def state_in(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The state of one of our modules among tensors with names as in a file, ``...<module>.<container>.<name>``."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if module in parts[:-2]:
            container, parameter = parts[-2:]
            found[state_key(container, parameter)] = tensor.detach().float()
    return found
