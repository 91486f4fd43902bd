"""ARM in several processes: all of them end with the same attention and the same replay rows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def is_first_process() -> bool:
    return not in_several() or dist.get_rank() == 0


def in_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def everywhere(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds in all processes."""
    if not in_several():
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return bool(found)


def gathered(own: list[str]) -> list[list[str]]:
    """The lists of all processes."""
    if not in_several():
        return [own]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    return found


def broadcast_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with those of rank 0.

    Every process does ARM's own work from the same data and seeds, but GPUs do not add in a fixed order, and DDP
    averages gradients, never parameters: a difference made outside its forward would stay.
    """
    if not in_several():
        return
    for tensor in tensors:
        dist.broadcast(tensor.data, src=0)
