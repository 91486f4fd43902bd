"""How many threads to use on a machine that others may be using too, and how long a run will take there."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import torch


def choose_threads() -> str:
    """Give torch one thread for each core that is free now, and say so.

    Threads that share a core with somebody else's work make each other wait at every operation, so that two of them
    can be slower than one. OMP_NUM_THREADS, where it is set, is left to decide.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return f"threads: {torch.get_num_threads()}, as OMP_NUM_THREADS says"
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count() or 1
    busy = round((os.cpu_count() or 1) * psutil.cpu_percent(interval=1.0) / 100)
    threads = max(1, min(torch.get_num_threads(), cores - busy))
    torch.set_num_threads(threads)
    return f"threads: {threads} on {cores} cores, of which others keep {busy} busy (OMP_NUM_THREADS overrides it)"


@torch.no_grad()
def seconds_of_a_pass(model: Any, batch: int = 8, length: int = 48) -> float:
    """Seconds of a forward of ``batch`` rows of ``length`` tokens, the least of three."""
    ids = torch.randint(100, 1000, (batch, length), device=model.device)
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        model(input_ids=ids)
        found.append(time.perf_counter() - begun)
    return min(found)
