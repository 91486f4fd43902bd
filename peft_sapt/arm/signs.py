"""Signs that a task is not being learned, each told once by a warning with its number and what to try."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ..pool.view import Pool
from ..pool_module import sharding_of
from ..routing.optimizers import newest_block
from .checks import unwrapped

LEAST_REACH = 0.02  # of a block: its scaling, times learning rate, times steps
LEAST_FALL = 0.02  # of the loss over a training, as a share of its first value; long answers fall little
LOW = 0.1  # a loss that has nowhere to fall to
EARLY = 10  # steps
HALF = 0.5  # of a task's own weight
USUAL_RATE, ALIGNED = 5e-3, 400  # learning rate of the examples, align_steps by default


class LearningWarning(UserWarning):
    """A task is likely not to be learned, or was not."""


def warn_of_short_reach(pool: Pool, optimizer: Any, steps: int) -> None:
    """Say so if a fresh LoRA block cannot move as far as would be seen in ``steps`` at its learning rate.

    Adam moves a number by about the learning rate in each step. With B = 0 at first, after n steps the output has
    moved by about ``scaling * rate * n`` of what the layer gives.
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or pool.config.block != "lora":
        return
    if sharding_of(pool.base) is not None:
        return
    own = {id(p) for p in newest_block(pool.base, pool.adapter)}
    groups = (g for g in optimizer.param_groups if any(id(p) in own for p in g["params"]))
    # a schedule may begin far below its highest rate
    rate = max((g.get(key, 0.0) for g in groups for key in ("max_lr", "initial_lr", "lr")), default=0.0)
    scaling = pool.config.scalings[-1]
    reach = scaling * rate * steps
    if not 0 < reach < LEAST_REACH:
        return
    better = min(USUAL_RATE, 10 * LEAST_REACH / (scaling * max(1, steps)))
    cure = f"TrainingArguments(learning_rate={better:.0e}), or more steps"
    if better <= rate:
        cure = "more steps, or a larger lora_alpha"
    warnings.warn(
        f"Task {pool.current_task!r} is about to be trained in {steps} steps at a learning rate of {rate:g}, in which "
        f"its block can change what a layer gives by about {100 * reach:.2g} %: too little to learn from. Try {cure}.",
        LearningWarning,
        stacklevel=4,
    )


def warn_of_closed_gate(pool: Pool, weight: float, align_steps: int, ended: bool) -> None:
    """Say so if the current task's own ``weight`` on its prompts is below a half, before its first step or at its
    end."""
    if weight >= HALF or len(pool.tasks) == 1:
        return
    cure = "Its prompts look like an old task's: an instruction before the input would tell them apart"
    if pool.router.needs_replay and align_steps < ALIGNED:
        cure = f"ArmCallback(align_steps={ALIGNED}), the default, fits the attention before and after training"
    elif pool.router.needs_replay:
        cure += ", or router='ridge' in a new pool"
    when = "ends with a weight of" if ended else "has, before its first step, a weight of"
    then = "other tasks' blocks answer them for the most part" if ended else "its block learns slowly or not at all"
    warnings.warn(
        f"Task {pool.current_task!r} {when} {weight:.2f} of its own block on its own prompts: {then}. {cure}.",
        LearningWarning,
        stacklevel=4,
    )


def warn_of_flat_loss(task: str, history: list[dict[str, Any]], steps: int) -> None:
    """Say so if no loss in the Trainer's ``history`` is below the first one, where that was logged early enough to be
    of an untrained block: within a tenth of the ``steps``, or the first ten."""
    logged = [(entry.get("step", 0), float(entry["loss"])) for entry in history if "loss" in entry]
    if len(logged) < 2 or logged[0][0] > max(EARLY, steps // 10):
        return
    losses = [loss for _, loss in logged]
    if losses[0] < LOW or min(losses) <= (1 - LEAST_FALL) * losses[0]:
        return
    warnings.warn(
        f"The loss of task {task!r} did not fall: it was {losses[0]:.3g} when it was first logged and is "
        f"{losses[-1]:.3g} at the end. Try another learning rate ({USUAL_RATE:.0e} is what the examples use for some "
        "dozens of steps), more epochs, or look whether the labels are right.",
        LearningWarning,
        stacklevel=4,
    )
