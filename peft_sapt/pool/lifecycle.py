"""The life cycle of tasks in a pool: add, fit, commit, reopen, remove."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import SaptConfig
from ..errors import PromptError, TaskError, TrainingError
from ..routing.memory import freeze_committed
from ..routing.optimizers import UNMOVED, block_sums, newest_block, steps_taken
from ..routing.prompts import embedding_weight
from ..routing.statistics import GIVEN, is_removed, removed_form
from ..validation import check_task_name, checked_record
from .view import Batches, Pool

HEAD_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def add_task(pool: Pool, name: str, r: int | None = None, lora_alpha: float | None = None) -> None:
    """See [`SaptModel.add_task`]."""
    config = pool.config
    check_task_name(name)
    if name in pool.tasks:
        raise TaskError(
            f"Task {name!r} is already in the pool ({pool.tasks}): choose another name, or remove_task({name!r})."
        )
    rank, alpha = config.r if r is None else r, config.lora_alpha if lora_alpha is None else lora_alpha
    grown_by(config, name, rank, alpha)  # which refuses what cannot be, before anything is changed
    if config.modules_to_save or config.task_type in HEAD_TASK_TYPES:
        raise TaskError(
            f"A second task is refused: a pool with modules_to_save or of type {config.task_type} has one head "
            "(or other full module) for all tasks, which each new task would overwrite. Use one adapter per task."
        )
    pool.refuse_sharded("add_task")
    if not pool.is_committed and not close_again(pool):
        commit_task(pool)
    for module in pool.modules():
        reference = next(p for attr in module.stacks for p in getattr(module, attr)[pool.adapter].parameters())
        newest = module.newest_part(pool.adapter, rank)
        module.append_task(pool.adapter, {k: v.to(reference.device, reference.dtype) for k, v in newest.items()})
    set_tasks(pool, grown_by(pool.config, name, rank, alpha), [*range(len(config.tasks)), -1])
    welcome_back(pool, name)
    pool.memory.show_own_config(pool.adapter).inference_mode = False
    pool.refresh_trainable()


def grown_by(config: SaptConfig, name: str, rank: int, alpha: float) -> SaptConfig:
    """The tasks of ``config`` and one more."""
    return SaptConfig(
        tasks=[*config.tasks, name],
        task_ranks=[*config.task_ranks, rank],
        task_alphas=[*config.task_alphas, alpha],
        replay_rows=[*config.replay_rows, 0],
    )


def remove_task(pool: Pool, name: str, forget: bool = False) -> None:
    """See [`SaptModel.remove_task`]."""
    config, index = pool.config, pool.index_of(name)
    if len(config.tasks) == 1:
        raise TaskError(
            f"{name!r} is the only task of the pool, and a pool cannot be empty: add another task first, or use "
            f"delete_adapter({pool.adapter!r})."
        )
    pool.refuse_sharded("remove_task")
    kept = [i for i in range(len(config.tasks)) if i != index]
    smaller = SaptConfig(
        tasks=[config.tasks[i] for i in kept],
        task_ranks=[config.task_ranks[i] for i in kept],
        task_alphas=[config.task_alphas[i] for i in kept],
        replay_rows=[config.replay_rows[i] for i in kept],
    )
    rows = pool.statistics.background(pool.adapter)
    retired = [] if forget or not rows else pool.statistics.retired(pool.adapter, index)
    for module in pool.modules():
        module.drop_part(pool.adapter, index, pool.sizes_of(module))
    set_tasks(pool, smaller, kept)
    if retired:
        own = pool.memory.show_own_config(pool.adapter)
        own.background_forms = [*own.background_forms, removed_form(name)]
        set_background(pool, [*rows, *retired])
    pool.refresh_trainable()


def welcome_back(pool: Pool, name: str) -> None:
    """Let prompts of a task that was removed, and comes back, be no longer those of no task."""
    own = pool.memory.show_own_config(pool.adapter)
    kept = [form != removed_form(name) for form in own.background_forms]
    if not all(kept):
        rows = [part for part, keep in zip(pool.statistics.background(pool.adapter), kept, strict=True) if keep]
        own.background_forms = [form for form, keep in zip(own.background_forms, kept, strict=True) if keep]
        set_background(pool, rows)


def set_tasks(pool: Pool, other: SaptConfig, kept: list[int]) -> None:
    """Let the pool describe the tasks of ``other``, and what is in no stack follow; ``kept`` as in Router.resize."""
    pool.memory.resize(pool.adapter, kept)
    pool.memory.show_own_config(pool.adapter).set_tasks(other)
    pool.statistics.resize(pool.adapter, kept)
    pool.router.resize(pool.adapter, kept)
    freeze_committed(pool.base)


def fit_router(pool: Pool, inputs: Batches, statistics: bool = True) -> None:
    """See [`SaptModel.fit_router`]; without ``statistics`` of the prompts where they have been taken already."""
    pool.refuse_sharded("fit_router")
    pool.router.check_fit(pool.adapter)
    pooled = pool.pooled_prompts(inputs)
    if not len(pooled):
        raise PromptError("fit_router needs training prompts of the current task, and got none.")
    pool.refuse_bad_rows("fit_router(inputs=...)", pooled)
    if statistics:
        pool.statistics.fit(pool.adapter, pooled)
    pool.router.fit(pool.adapter, pooled)
    pool.memory.remember_fitted(pool.adapter, pooled)


def fit_background(pool: Pool, forms: Sequence[Batches]) -> None:
    """See [`SaptModel.fit_background`]."""
    pool.refuse_sharded("fit_background")
    if not pool.config.statistics_rank:
        raise TaskError("fit_background needs the tasks' statistics, and statistics_rank=0 keeps none.")
    rows = [pool.pooled_prompts(form) for form in forms]
    if not all(len(part) >= 2 for part in rows):
        raise PromptError("fit_background needs at least two prompts in each form. Nothing was changed.")
    for part in rows:
        pool.refuse_bad_rows("fit_background(forms=...)", part)
    own, known = pool.memory.show_own_config(pool.adapter), pool.statistics.background(pool.adapter)
    removed = [(form, part) for form, part in zip(own.background_forms, known, strict=True) if is_removed(form)]
    own.background_forms = [*([GIVEN] * len(rows)), *(form for form, _ in removed)]
    set_background(pool, [*rows, *(part for _, part in removed)])


def set_background(pool: Pool, rows: list[Tensor]) -> None:
    """Keep ``rows``, features [n, d] of prompts that belong to no task, by form, in place of what was kept."""
    pool.statistics.set_background(pool.adapter, rows)
    pool.router.on_background(pool.adapter)


def commit_task(
    pool: Pool, inputs: Batches | None = None, replay: Batches | None = None, statistics: bool = True
) -> None:
    """See [`SaptModel.commit_task`]; without ``statistics`` of the prompts where they have been taken already."""
    adapter, memory, router = pool.adapter, pool.memory, pool.router
    pool.refuse_sharded("commit_task")
    if pool.is_committed:
        raise TaskError(
            f"Task {pool.current_task!r} is committed already: add_task(...) for new data, or reopen_task() to "
            "train it further."
        )
    pooled = pool.pooled_prompts(memory.seen(adapter) if inputs is None else inputs)
    rows = pool.pooled_prompts([] if replay is None else replay)
    refuse_unseen(pool, pooled, given=inputs is not None)
    for what, found in (("inputs", pooled), ("replay", rows)):
        pool.refuse_bad_rows(f"commit_task({what}=...)", found)
    pool.refuse_bad_weights()
    refuse_unmoved(pool)
    if len(pooled):
        if statistics and (inputs is not None or not pool.statistics.known(adapter)[-1]):
            pool.statistics.fit(adapter, pooled)
        router.on_commit(adapter, pooled)
        target = pool.mean_weights(pooled)  # [T]
    else:
        target = torch.eye(len(pool.tasks))[-1]
    memory.commit(adapter, target, rows)
    forget_prompts(pool)  # which may be of an earlier training; a callback notes those of this one
    pool.statistics.close(adapter)
    freeze_committed(pool.base)


def refuse_unseen(pool: Pool, pooled: Tensor, given: bool) -> None:
    """Raises [`TaskError`] if no prompt of the current task is known, from which key and target would come.

    A model without token embeddings has no prompts; its caller gives the weights, and no attention is ever asked.
    """
    if len(pooled) or (embedding_weight(pool.base) is None and pool.router.needs_replay):
        return
    task = pool.current_task
    if given:
        raise TaskError(f"commit_task(inputs=...) got no row of task {task!r}: give its training prompts.")
    why = "no training forward has read one since the task was opened or last committed"
    if pool.adapter in pool.memory.loaded:
        why = "the pool was loaded, and its file does not keep the rows that training saw before"
    raise TaskError(
        f"Task {task!r} cannot be committed, since no training prompt of it is known: {why}. (Forwards in eval mode, "
        "without gradients, or with sapt_task or sapt_weights read none.) Pass commit_task(inputs=batches) with its "
        "training prompts."
    )


def refuse_unmoved(pool: Pool) -> None:
    """Raises [`TrainingError`] if optimizers took steps since the current task was first trained on, none of them held
    its block, and nothing else moved it. An imported block need not move."""
    training = pool.memory.training_of(pool.adapter)
    steps, sums = training.start or (0, [])
    if not sums or steps == steps_taken() or training.block_is_held:
        return
    if training.block_is_imported:  # training may have been the router's alone
        unused = all(p.grad is None for p in newest_block(pool.base, pool.adapter))
        if unused or training.router_is_held:
            return
    if block_sums(pool.base, pool.adapter) == sums:
        raise TrainingError(UNMOVED.format(task=pool.current_task))


def reopen_task(pool: Pool, forget: bool = False) -> None:
    """See [`SaptModel.reopen_task`]."""
    pool.refuse_sharded("reopen_task")
    if forget:
        forget_prompts(pool)
    if not pool.is_committed:
        return
    pool.memory.reopen(pool.adapter)
    pool.statistics.reopen(pool.adapter)
    pool.router.reopen(pool.adapter)
    pool.memory.show_own_config(pool.adapter).inference_mode = False
    freeze_committed(pool.base)
    pool.refresh_trainable()
    pool.memory.training_of(pool.adapter).reopened = block_sums(pool.base, pool.adapter)


def close_again(pool: Pool) -> bool:
    """Commit a task that was opened again and not worked on since, as it was before; whether it was such a one."""
    adapter, memory = pool.adapter, pool.memory
    before, now = pool.statistics.reopened.get(adapter), pool.statistics.moments(adapter)[-1]
    shown = before is not None and (now is None or now.rows != before.rows)
    if adapter not in memory.undone or memory.seen(adapter) or shown:
        return False
    if block_sums(pool.base, adapter) != memory.training_of(adapter).reopened:
        return False
    memory.commit(adapter, *memory.undone[adapter])
    pool.statistics.close(adapter)
    freeze_committed(pool.base)
    return True


def forget_prompts(pool: Pool) -> None:
    """Take the digests of prompts out of the current task's record."""
    record = pool.config.records.get(pool.current_task, {})
    if "prompts" in record:
        kept = {key: value for key, value in record.items() if key != "prompts"}
        config = pool.memory.show_own_config(pool.adapter)
        config.records = {**config.records, pool.current_task: kept}


def record_task(pool: Pool, name: str, **fields: str | float | None) -> None:
    """See [`SaptModel.record_task`]."""
    pool.index_of(name)
    config = pool.memory.show_own_config(pool.adapter)
    config.records = {**config.records, name: {**config.records.get(name, {}), **checked_record(fields)}}
