"""Signs that a task is not being learned, each told once by a warning with its number and what to try."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..pool.view import Pool
from ..pool_module import sharding_of
from ..routing.optimizers import newest_block

LEAST_REACH = 0.02  # of a block: its scaling, times learning rate, times steps
LEAST_FALL = 0.02  # of the loss over a training, as a share of its first value; long answers fall little
HALF = 0.5  # of a task's own weight


class LearningWarning(UserWarning):
    """A task is likely not to be learned, or was not."""


def warn_of_short_reach(pool: Pool, optimizer: Any, steps: int) -> None:
    """Say so if a LoRA block cannot move as far as would be seen in ``steps`` at its learning rate.

    Adam moves a number by about the learning rate in each step. With B = 0 at first, after n steps the output has
    moved by about ``scaling * rate * n`` of what the layer gives.
    """
    while hasattr(optimizer, "optimizer"):  # accelerate's wrappers
        optimizer = optimizer.optimizer
    if pool.config.block != "lora" or sharding_of(pool.base) is not None:
        return
    own = {id(p) for p in newest_block(pool.base, pool.adapter)}
    groups = getattr(optimizer, "param_groups", None) or ()
    rates = [g.get("initial_lr", g["lr"]) for g in groups if any(id(p) in own for p in g["params"])]
    if not rates or not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    rate, scaling = max(rates), pool.config.scalings[-1]
    reach = scaling * rate * steps
    if 0 < reach < LEAST_REACH:
        warnings.warn(
            f"Task {pool.current_task!r} is about to be trained in {steps} steps at a learning rate of {rate:g}, in "
            f"which its block can change what a layer gives by about {100 * reach:.2g} %: too little to learn from. "
            f"Try TrainingArguments(learning_rate={enough(scaling, steps):.0e}), or more steps; 5e-3 is what the "
            "examples use for some dozens.",
            LearningWarning,
            stacklevel=4,
        )


def enough(scaling: float, steps: int) -> float:
    """A learning rate at which a block has ten times the least reach, at most that of the examples."""
    return min(5e-3, 10 * LEAST_REACH / (scaling * max(1, steps)))


def warn_of_closed_gate(pool: Pool, weight: float, ended: bool) -> None:
    """Say so if the current task's own ``weight`` on its prompts is below a half, before its first step or at its
    end."""
    if weight >= HALF or len(pool.tasks) == 1:
        return
    if ended:
        text = (
            f"Task {pool.current_task!r} ends with a weight of {weight:.2f} of its own block on its own prompts: they "
            "are answered by other tasks' blocks for the most part. Its prompts may look like an old task's; try "
            "ArmCallback(align_steps=) above 400, or router='ridge' in a new pool."
        )
    else:
        text = (
            f"The block of task {pool.current_task!r} has a weight of {weight:.2f} on its own prompts before its "
            "first step, so it learns slowly or not at all. ArmCallback(align_steps=400), the default, fits the "
            "attention before training."
        )
    warnings.warn(text, LearningWarning, stacklevel=4)


def warn_of_flat_loss(task: str, losses: list[float]) -> None:
    """Say so if none of the ``losses`` that were logged, oldest first, is below the first one."""
    if len(losses) < 2 or losses[0] <= 0 or min(losses) <= (1 - LEAST_FALL) * losses[0]:
        return
    warnings.warn(
        f"The loss of task {task!r} was {losses[0]:.3g} when it was first logged and is {losses[-1]:.3g} at the end: "
        "nothing was learned. Try a higher learning rate (5e-3 is what the examples use), more epochs, or look "
        "whether the labels are right.",
        LearningWarning,
        stacklevel=4,
    )
