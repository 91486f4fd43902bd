"""Whether an optimizer holds what a pool trains, and whether a block has moved since training began.

``add_task`` replaces parameters, so an optimizer that was built before steps on what is not in the model: the new
block would never move, without a word. torch tells of each step of each optimizer before it is taken, whoever takes
it (a Trainer, accelerate's wrapper, a loop of your own), so there it is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import TrainingError
from ..pool_module import PoolModule, changes_of_parts, latest_of
from .memory import LIVE, TaskMemory
from .router import Router

REPLACED = (
    "The optimizer holds {count} parameters that are no longer in the model, and not those in their place ({names}, "
    "...), which would not be trained: it was built before add_task (or remove_task, import_task), which replace "
    "parameters. Build a new optimizer, and Trainer and scheduler, after it."
)
BY_NAME = (
    "{helper} picks parameters by LoRA's names, which the blocks of a pool do not have: {effect}. Use "
    "peft_sapt.optimizer_groups(model, lr, b_lr_ratio=...) with an optimizer of your choice."
)
UNMOVED = (
    "Task {task!r} is not committed: training read its rows and optimizers took steps, yet its block is what it was "
    "before the first of them, since none of them held it. Build the optimizer after "
    "add_task (peft_sapt.optimizer_groups(model, lr)) and train; remove_task({task!r}) drops the task."
)
LORA_PLUS = 4  # groups of PEFT's helper: A, embeddings, B, B without decay
Sums = list[tuple[float, float]]
_looked_at: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, list[tuple[ref[TaskMemory], str, bool]]]] = (
    WeakKeyDictionary()
)
_counts = {"steps": 0, "watching": 0}


def watch_optimizers() -> None:
    """From now on look at each optimizer of this process before its first step, and again after a replacement."""
    if not _counts["watching"]:
        register_optimizer_step_pre_hook(before_step)
        _counts["watching"] = 1


def steps_taken() -> int:
    """Steps of all optimizers of this process since they are watched."""
    return _counts["steps"]


def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raises [`TrainingError`] if ``optimizer`` holds what was replaced and not what is in its place, or if it was
    built by a helper that takes the factors of a pool for something else."""
    if not LIVE:
        return
    known = _looked_at.get(optimizer)
    if known is None or known[0] != changes_of_parts():
        _refuse_replaced(optimizer)
        _refuse_by_name(optimizer)
        known = _looked_at[optimizer] = changes_of_parts(), _pools_in(optimizer)
    for reference, adapter, block in known[1]:
        memory = reference()
        if memory is not None:
            setattr(memory.training_of(adapter), "block_is_held" if block else "router_is_held", True)
    _counts["steps"] += 1


def _memories() -> list[TaskMemory]:
    """Those that are on a base model."""
    return [memory for memory in list(LIVE) if memory.hooks is not None and memory.hooks.base is not None]


def _pools_in(optimizer: torch.optim.Optimizer) -> list[tuple[ref[TaskMemory], str, bool]]:
    """The pools of which ``optimizer`` holds what trains: a memory, an adapter, and whether it is of the newest block
    (or else of the router alone)."""
    held, found = {id(p) for group in optimizer.param_groups for p in group["params"]}, []
    for memory in _memories():
        for adapter in memory.configs:
            block = any(id(p) in held for p in newest_block(memory.hooks.base, adapter))
            if block or any(id(p) in held for p in memory.hooks.router_of(adapter).parameters()):
                found.append((ref(memory), adapter, block))
    return found


def _refuse_replaced(optimizer: torch.optim.Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    known = {id(p) for p in held}
    missing = {id(now): now for p in held if (now := latest_of(p)) is not p and now.requires_grad}
    missing = {key: now for key, now in missing.items() if key not in known}
    if missing:
        names = {p: n for memory in _memories() for n, p in memory.hooks.base.named_parameters() if id(p) in missing}
        raise TrainingError(REPLACED.format(count=len(missing), names=", ".join(sorted(names.values())[:3])))


def _refuse_by_name(optimizer: torch.optim.Optimizer) -> None:
    factors = {id(p) for memory in _memories() for p in _factors_b(memory.hooks.base)}
    with_b = [group for group in optimizer.param_groups if any(id(p) in factors for p in group["params"])]
    if not with_b:
        return
    if type(optimizer).__name__ == "LoraFAOptimizer":
        raise TrainingError(BY_NAME.format(helper="LoRA-FA's optimizer", effect="no A would be frozen"))
    groups, fastest = optimizer.param_groups, max(_rate(group) for group in with_b)
    if not any(not group["params"] and _rate(group) > fastest for group in groups):
        return
    effect = "the group of the B factors is empty, and B would train at the rate of A"
    message = BY_NAME.format(helper="A LoRA+ helper", effect=effect)
    if len(groups) == LORA_PLUS and _rate(groups[2]) == _rate(groups[3]):
        raise TrainingError(message)
    warnings.warn(f"If an empty parameter group was meant for factors B: {message}", stacklevel=4)


def _factors_b(base: nn.Module | None) -> list[nn.Parameter]:
    modules = [] if base is None else [m for m in base.modules() if isinstance(m, PoolModule) and hasattr(m, "sapt_B")]
    return [p for module in modules for p in module.sapt_B.parameters()]  # type: ignore[union-attr]  # a ModuleDict


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("initial_lr", group.get("lr")) or 0.0)  # None where an optimizer finds it by itself


def newest_block(base: nn.Module | None, adapter: str) -> Iterator[nn.Parameter]:
    """The parameters of the newest block of a pool on ``base``: its factors, or its soft prompt."""
    for module in () if base is None else base.modules():
        if isinstance(module, PoolModule) and not isinstance(module, Router) and module.holds(adapter):
            for container in module.stacks:
                yield from getattr(module, container)[adapter].parameters()


def block_sums(base: nn.Module, adapter: str) -> Sums:
    """Two sums of each tensor of the newest block that may train: if they are the same later, it has not moved."""
    found = []
    for parameter in newest_block(base, adapter):
        if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
            values = parameter.detach().cpu().double()
            found.append((float(values.sum()), float(values.abs().sum())))
    return found
