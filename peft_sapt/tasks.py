"""The life cycle of tasks in a pool: list, add, commit, reopen, remove."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .attention import SharedAttention
from .config import SaptConfig
from .errors import PromptError, TaskError, TrainingError
from .pool import PoolModule, linear_from, seal_heads, sharding_of
from .records import checked_records
from .task_names import TaskNames
from .validation import check_task_name

HEAD_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def seal_from_targets(model: nn.Module) -> None:
    """Seal each pool whose newest task is committed, and unseal the others, on every module of ``model``."""
    attention = next((m for m in model.modules() if isinstance(m, SharedAttention)), None)
    if attention is None:
        return
    for adapter in attention.configs:
        if attention.targets(adapter).device.type == "meta":
            continue  # not loaded yet
        sealed = attention.committed(adapter)[-1]
        for module in model.modules():
            if isinstance(module, PoolModule) and module.holds(adapter):
                module.seal(adapter, sealed)
        config = attention.configs[adapter]
        trains = adapter in attention.active_adapters and not config.inference_mode
        seal_heads(model, adapter, attention.head_is_shut(adapter), trains)


class TaskPool(TaskNames):
    """Task methods of [`SaptModel`]; they act on the active adapter."""

    def pool_modules(self) -> list[PoolModule]:
        """Every module that holds parts of the active pool: target layers, then the attention."""
        found = [m for m in self.model.modules() if isinstance(m, PoolModule) and m.holds(self.pool_name)]
        return sorted(found, key=lambda m: isinstance(m, SharedAttention))

    def add_task(self, name: str, r: int | None = None, lora_alpha: float | None = None) -> None:
        """Freeze the current task for good and open a fresh block and key for ``name``.

        The new block is the identity (B = 0) and its key is drawn as the paper does; ``ArmCallback`` then opens its
        gate. A current task that was never committed is committed first, as by ``commit_task()``. Parameters are
        replaced: build the optimizer, DDP or FSDP afterwards.

        Args:
            name: not in the pool yet; no slash or dot, not all digits.
            r, lora_alpha: rank and alpha of the new block; the config's by default.

        Raises:
            TaskError: the name is malformed or taken, or the model is sharded. Nothing is changed then.
        """
        config, adapter = self.pool_config, self.pool_name
        check_task_name(name)
        if name in self.tasks:
            raise TaskError(
                f"Task {name!r} is already in the pool ({self.tasks}): choose another name, or remove_task({name!r})."
            )
        rank, alpha = config.r if r is None else r, config.lora_alpha if lora_alpha is None else lora_alpha
        grown = SaptConfig(
            tasks=[*self.tasks, name],
            task_ranks=[*(config.task_ranks or []), rank],
            task_alphas=[*(config.task_alphas or []), alpha],
            replay_rows=[*(config.replay_rows or []), 0],
        )
        if config.modules_to_save or config.task_type in HEAD_TASK_TYPES:
            raise TaskError(
                f"A second task is refused: a pool with modules_to_save or of type {config.task_type} has one head "
                "(or other full module) for all tasks, which each new task would overwrite. Use one adapter per task."
            )
        self.refuse_sharded("add_task")
        if not self.attention.committed(adapter)[-1]:
            self.commit_task()
        for module in self.pool_modules():
            reference = next(p for attr in module.stacks for p in getattr(module, attr)[adapter].parameters())
            newest = module.newest_part(adapter, rank)
            module.push(adapter, {k: v.to(reference.device, reference.dtype) for k, v in newest.items()})
        targets = nn.functional.pad(self.attention.targets(adapter), (0, 1, 0, 1))
        self.attention.sapt_targets[adapter] = linear_from(targets)
        if self.attention.closed_form(adapter):
            self.attention.resize(adapter, [*range(len(self.tasks)), -1])
        config.inference_mode = False
        self.take_tasks(config, grown)

    def remove_task(self, name: str) -> None:
        """Take a task's block, key, target and replay rows out of the pool.

        The blocks that remain keep their bytes; attention that went to the removed task is shared out among the rest
        in the stored targets. Without its newest task, the pool's next older one becomes the newest.

        Raises:
            TaskError: unknown name, or the only task of the pool (delete the adapter instead).
        """
        adapter, config = self.pool_name, self.pool_config
        index = self.index_of(name)
        if len(self.tasks) == 1:
            raise TaskError(
                f"{name!r} is the only task of the pool, and a pool cannot be empty: use delete_adapter({adapter!r}), "
                "or add another task first."
            )
        self.refuse_sharded("remove_task")
        kept = [i for i in range(len(self.tasks)) if i != index]
        smaller = SaptConfig(
            tasks=[self.tasks[i] for i in kept],
            task_ranks=[(config.task_ranks or [])[i] for i in kept],
            task_alphas=[(config.task_alphas or [])[i] for i in kept],
            replay_rows=[(config.replay_rows or [])[i] for i in kept],
        )
        targets = self.attention.targets(adapter)[kept][:, kept]
        replay = self.attention.replay(adapter)
        committed = [self.attention.committed(adapter)[i] for i in kept]
        for module in self.pool_modules():
            module.pull(adapter, index, self.sizes_of(module))
        for i, done in enumerate(committed):
            left = targets[i].sum()
            targets[i] = targets[i] / left if left > 1e-6 else nn.functional.one_hot(torch.tensor(i), len(kept)) * done
        self.attention.sapt_targets[adapter] = linear_from(targets)
        self.attention.set_replay(adapter, [replay[i] for i in kept])
        if self.attention.closed_form(adapter):
            self.attention.resize(adapter, kept)
        self.take_tasks(config, smaller)

    def fit_router(self, inputs: Iterable[Mapping[str, Tensor]] | Tensor) -> None:
        """Show the current task's training prompts to a closed-form router, once, before the task is trained.

        Learning and selection then share its weights. ``ArmCallback`` calls this; the sums of older tasks stay as they
        are, byte for byte.

        Args:
            inputs: the task's training inputs, as batches (dicts with ``input_ids``, ...) or as pooled prompts [N, d].

        Raises:
            TaskError: the pool's router is not a closed-form one, or it has seen this task.
            PromptError: there are no rows, or some without prompt tokens. Nothing is changed then.
        """
        adapter, attention = self.pool_name, self.attention
        self.refuse_sharded("fit_router")
        if not attention.closed_form(adapter):
            raise TaskError("fit_router is for SaptConfig(router='ridge'); a learned attention is fitted in training.")
        if attention.learned(adapter)[-1]:
            raise TaskError(
                f"The router has seen task {self.current_task!r} already, and keeps no rows that could be replaced: "
                "remove_task and add_task start it over."
            )
        pooled = self.pooled_prompts(inputs)
        if not len(pooled):
            raise PromptError("fit_router needs training prompts of the current task, and got none.")
        self.refuse_bad_rows("fit_router(inputs=...)", pooled)
        attention.learn(adapter, pooled)

    def commit_task(
        self,
        inputs: Iterable[Mapping[str, Tensor]] | Tensor | None = None,
        replay: Iterable[Mapping[str, Tensor]] | Tensor | None = None,
    ) -> None:
        """Freeze the current task and store its attention target (SAPT, section 3.3); ``ArmCallback`` calls this.

        Args:
            inputs: the task's own training inputs, as batches (dicts with ``input_ids``, ...) or as pooled prompts
                [N, d]. The target is the mean attention over them, and the key of a first task becomes their mean
                query (as it got no gradient). By default the first 512 rows that training forwards saw; without any,
                the target is the task itself and a first key stays random.
            replay: rows that stand for this task while later ones train, as batches or pooled prompts [n, d]:
                pseudo-samples, or real rows if you may keep them. Only their pooled embeddings are kept.

        Raises:
            TaskError: the current task is committed already (``reopen_task()`` allows training it again).
            TrainingError: its block or key is not finite; it stays open.
        """
        adapter, attention = self.pool_name, self.attention
        self.refuse_sharded("commit_task")
        if attention.committed(adapter)[-1]:
            raise TaskError(
                f"Task {self.current_task!r} is committed already: add_task(...) for new data, or reopen_task() to "
                "train it further."
            )
        seen = self.prompt_router.routing.seen.get(adapter, [])
        pooled = self.pooled_prompts(seen if inputs is None else inputs)
        rows = self.pooled_prompts([] if replay is None else replay)
        for what, found in (("inputs", pooled), ("replay", rows)):
            self.refuse_bad_rows(f"commit_task({what}=...)", found)
        self.refuse_bad_weights()
        closed = attention.closed_form(adapter)
        if closed and not attention.learned(adapter)[-1]:
            if not len(pooled):
                raise TaskError(
                    f"The router has seen no prompt of task {self.current_task!r}, so it could never choose it: train "
                    "the task, pass commit_task(inputs=...), or remove it."
                )
            self.fit_router(pooled)
        with torch.no_grad():
            if len(self.tasks) == 1 and len(pooled) and not closed:
                attention.sapt_key[adapter].weight.copy_(attention.query(pooled, adapter).mean(dim=0, keepdim=True))
            target = torch.zeros_like(attention.targets(adapter)[-1])  # [T]
            if len(pooled):
                target.copy_(self.prompt_router.attend(pooled, adapter).mean(dim=0))
            else:
                target[-1] = 1.0
            attention.set_replay(adapter, [*attention.replay(adapter)[:-1], rows.to(attention.weight)])
            attention.targets(adapter)[-1] = target
        self.prompt_router.routing.seen.pop(adapter, None)
        seal_from_targets(self.model)

    def reopen_task(self) -> None:
        """Undo the commit of the current task, so that it can be trained further; its target and replay rows go."""
        adapter, attention = self.pool_name, self.attention
        self.refuse_sharded("reopen_task")
        attention.targets(adapter)[-1] = 0.0
        attention.set_replay(adapter, [*attention.replay(adapter)[:-1], attention.replay(adapter)[-1][:0]])
        self.pool_config.inference_mode = False
        seal_from_targets(self.model)
        self.refresh_trainable()

    def task_state(self, name: str) -> dict[str, Tensor]:
        """Everything that belongs to one task, as views: A [r, in] and B [r, out] by layer, and its key [1, d]."""
        index = self.index_of(name)
        names = {module: key for key, module in self.model.named_modules() if isinstance(module, PoolModule)}
        state = {}
        for module in self.pool_modules():
            for attr in module.stacks:
                parts = module.parts(attr, self.pool_name, self.sizes_of(module))
                state[f"{names[module]}.{attr}"] = parts[index]
        return state

    def sizes_of(self, module: PoolModule) -> list[int]:
        """Rows of each task's part in the stacks of ``module``, oldest first."""
        return module.part_sizes(self.pool_config)

    def take_tasks(self, config: SaptConfig, other: SaptConfig) -> None:
        """Let ``config`` describe the tasks that ``other`` does, and seal, unseal and switch accordingly."""
        for name in ("tasks", "task_ranks", "task_alphas", "replay_rows", "task_name"):
            setattr(config, name, getattr(other, name))
        config.records = checked_records(config.records, config.tasks or [])
        self.prompt_router.routing.forget(self.pool_name)
        seal_from_targets(self.model)
        self.refresh_trainable()

    def refresh_trainable(self) -> None:
        """Let PEFT switch gradients on and off as it would after set_adapter; sealed parts stay frozen."""
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter(self.active_adapters, inference_mode=bool(self.pool_config.inference_mode))

    def refuse_bad_rows(self, what: str, pooled: Tensor) -> None:
        """Raises [`PromptError`] if a row of ``pooled`` [N, d] is not finite, as those without a prompt token are."""
        if not bool(pooled.isfinite().all()):
            bad = (~pooled.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise PromptError(
                f"{what}: rows {bad[:10]} have no prompt token (all padding) or are not finite. Drop them; nothing "
                "was changed."
            )

    def refuse_bad_weights(self) -> None:
        """Raises [`TrainingError`] if the current task's block or key holds NaN or infinity."""
        heads = {
            key: p
            for key, p in self.model.named_parameters()
            if p.requires_grad and f".modules_to_save.{self.pool_name}." in key
        }
        for key, tensor in {**self.task_state(self.current_task), **heads}.items():
            if not bool(tensor.isfinite().all()):
                raise TrainingError(
                    f"{key!r} of task {self.current_task!r} is not finite, so it is not committed: go back to an "
                    "earlier checkpoint, or remove_task and train it anew."
                )

    def refuse_sharded(self, what: str) -> None:
        """Raises [`TaskError`] if FSDP has the parameters that ``what`` needs in whole."""
        if sharding_of(self.model) is not None:
            raise TaskError(
                f"{what} needs whole parameters and the model is sharded: call it before FSDP wraps the model, or "
                "save the pool and load it in one process."
            )
