"""Starting a new task's block where the shared attention puts its prompts among older blocks, or at one of them."""

from __future__ import annotations

import torch

from ..errors import PromptError, TaskError
from .lifecycle import add_task
from .view import Batches, Pool


def has_started(pool: Pool) -> bool:
    """Whether the current task's block can be seen to have trained, or its router to know it."""
    if pool.router.is_fitted(pool.adapter) or pool.memory.seen(pool.adapter):
        return True
    if pool.memory.training_of(pool.adapter).block_is_copied:
        return True
    return any(module.has_trained(pool.adapter) for module in pool.modules())


@torch.no_grad()
def warm_start(pool: Pool, inputs: Batches) -> dict[str, float]:
    """See [`SaptModel.warm_start`]."""
    task = pool.current_task
    pool.refuse_sharded("warm_start")
    if len(pool.tasks) == 1:
        raise TaskError(f"{task!r} is the pool's first task: there is no older block to start from.")
    if pool.is_committed:
        raise TaskError(f"Task {task!r} is committed: only a fresh block can be started again.")
    if pool.router.is_fitted(pool.adapter):
        raise TaskError(f"The router knows task {task!r} already: call warm_start before fit_router.")
    if has_started(pool):
        raise TaskError(
            f"The block of task {task!r} has been trained, and warm_start would replace it: remove_task and add_task "
            "start it over."
        )
    pooled = pool.pooled_prompts(inputs)
    if not len(pooled):
        raise PromptError("warm_start needs training prompts of the current task, and got none.")
    pool.refuse_bad_rows("warm_start(inputs=...)", pooled)
    shares = pool.router.log_weights(pool.adapter, pooled)[:, :-1].softmax(dim=-1).mean(dim=0)  # [T - 1]
    for module in pool.modules():
        module.init_from_mixture(pool.adapter, shares)
    return dict(zip(pool.tasks, shares.tolist(), strict=False))


@torch.no_grad()
def continue_task(pool: Pool, name: str, new_name: str | None = None) -> str:
    """See [`SaptModel.continue_task`]."""
    index, config = pool.index_of(name), pool.config
    if new_name is None:
        new_name = next(free for n in range(2, len(pool.tasks) + 3) if (free := f"{name}-{n}") not in pool.tasks)
    add_task(pool, new_name, config.task_ranks[index], config.task_alphas[index])
    shares = torch.zeros(len(pool.tasks) - 1)
    shares[index] = 1.0
    for module in pool.modules():
        module.init_from_mixture(pool.adapter, shares)
    pool.memory.training_of(pool.adapter).block_is_copied = True
    return new_name
