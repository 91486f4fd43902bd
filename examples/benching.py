"""What the benchmarks share: alternating rounds, ratios with their spread, saved activations, tables."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from unittest import mock

import torch
from torch import nn


def alternate(runs: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run in each of ``rounds`` rounds; every round runs all of them, the order turning by one."""
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = timed(runs[name])
            if number >= warmup:
                times[name].append(seconds)
    return times


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run: between two events on a GPU, by the clock without one."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def with_kernel(name: str, run: Callable[[], object]) -> Callable[[], None]:
    """``run`` with another implementation of the op."""

    def other() -> None:
        with mock.patch.dict(os.environ, PEFT_SAPT_KERNEL=name):
            run()

    return other


def where() -> str:
    """What the times are of."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"


def quartiles(times: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of two runs, round by round."""
    ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return low, middle, high


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct storages that one forward keeps for its backward, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
