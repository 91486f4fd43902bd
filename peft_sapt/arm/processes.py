"""ARM in several processes: all of them end with the same attention and the same replay rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


def is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with those of rank 0.

    Every process does ARM's own work from the same data and seeds, but GPUs do not add in a fixed order, and DDP
    averages gradients, never parameters: a difference made outside its forward would stay.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor.data, src=0)
