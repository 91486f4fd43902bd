"""The active pool of a model, as everything that works on pools sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import PromptError, TaskError, TrainingError
from ..layer import SaptLayer
from ..pool_module import PoolModule, sharding_of
from ..routing.hooks import RoutingHooks
from ..routing.memory import TaskMemory
from ..routing.prompts import read_batches
from ..routing.router import Router
from ..routing.statistics import TaskStatistics

Batches = (
    Iterable[Mapping[str, Any] | Tensor] | Mapping[str, Any] | Tensor
)  # arguments of forwards, or pooled prompts [n, d]


@dataclass(frozen=True)
class Pool:
    """One adapter on a base model: its config, its router, what it remembers of its tasks, and the hooks on the base.

    It holds no state of its own; [`SaptModel.pool`] makes one for each question.
    """

    base: nn.Module
    adapter: str
    config: SaptConfig
    router: Router
    memory: TaskMemory
    hooks: RoutingHooks

    @property
    def statistics(self) -> TaskStatistics:
        """What is known of its tasks' prompts, and of prompts that belong to none."""
        return self.hooks.statistics

    # --- tasks ----------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, oldest first; a copy."""
        return list(self.config.tasks)

    @property
    def current_task(self) -> str:
        """The newest task: the only one that can be trained."""
        return self.config.tasks[-1]

    @property
    def committed_tasks(self) -> list[str]:
        """Names of the tasks that have been committed."""
        return [name for name, done in zip(self.tasks, self.memory.committed(self.adapter), strict=True) if done]

    @property
    def is_committed(self) -> bool:
        """Whether the newest task is."""
        return self.memory.committed(self.adapter)[-1]

    def index_of(self, name: str) -> int:
        """Place of a task in ``tasks``; raises [`TaskError`] if there is none of this name."""
        if name not in self.tasks:
            raise TaskError(f"There is no task {name!r} in the pool. Its tasks are {self.tasks}.")
        return self.tasks.index(name)

    # --- parts ----------------------------------------------------------------------------------------------------

    def modules(self) -> list[PoolModule]:
        """Every module that holds a part for each task: target layers and soft prompts, then the router."""
        found = [m for m in self.base.modules() if isinstance(m, PoolModule) and m.stacks and m.holds(self.adapter)]
        return sorted(found, key=lambda m: m is self.router)

    def layers(self) -> dict[str, SaptLayer]:
        """Target layers by the names that their base layers had in the base model."""
        return {k: m for k, m in self.base.named_modules() if isinstance(m, SaptLayer) and m.holds(self.adapter)}

    def sizes_of(self, module: PoolModule) -> list[int]:
        """Rows of each task's part in the stacks of ``module``, oldest first."""
        return module.part_sizes(self.config)

    def task_state(self, name: str) -> dict[str, Tensor]:
        """Everything that belongs to one task, as views, by module and container."""
        index, own = self.index_of(name), self.modules()
        names = {module: key for key, module in self.base.named_modules() if isinstance(module, PoolModule)}
        return {
            f"{names[module]}.{attr}": module.parts(attr, self.adapter, self.sizes_of(module))[index]
            for module in own
            for attr in module.stacks
        }

    def refresh_trainable(self) -> None:
        """Let PEFT switch gradients on and off as it would after set_adapter; frozen parts stay frozen."""
        for module in self.base.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([self.adapter], inference_mode=bool(self.config.inference_mode))

    # --- prompts --------------------------------------------------------------------------------------------------

    def pooled_prompts(
        self, batches: Batches, tokens: list[list[int]] | None = None, remember: bool = False
    ) -> Tensor:
        """Features of all prompts in ``batches``, [N, feature_dim] in float32; the rest as in [`read_batches`]."""
        reader, device = self.hooks.reader, self.memory.device
        return read_batches(self.base, self.config, reader, batches, device, tokens, remember)

    @torch.no_grad()
    def mean_weights(self, pooled: Tensor) -> Tensor:
        """Mean of the router's weights [T] on pooled prompts [n, d], of which none is left to the base model."""
        return self.router.log_weights(self.adapter, pooled).exp().mean(dim=0)

    # --- refusals -------------------------------------------------------------------------------------------------

    def refuse_sharded(self, what: str) -> None:
        """Raises [`TaskError`] if FSDP has the parameters that ``what`` needs in whole."""
        if sharding_of(self.base) is not None:
            raise TaskError(
                f"{what} needs whole parameters and the model is sharded: call it before FSDP wraps the model, or "
                "save the pool and load it in one process."
            )

    def refuse_bad_rows(self, what: str, pooled: Tensor) -> None:
        """Raises [`PromptError`] if a row of ``pooled`` [N, d] is not finite, as those without a prompt token are."""
        if not bool(pooled.isfinite().all()):
            bad = (~pooled.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise PromptError(
                f"{what}: rows {bad[:10]} have no prompt token (all padding) or are not finite. Drop them; nothing "
                "was changed."
            )

    def refuse_bad_weights(self) -> None:
        """Raises [`TrainingError`] if something that trains for the current task holds NaN or infinity."""
        trained = {
            key: p for key, p in self.base.named_parameters() if p.requires_grad and f".{self.adapter}." in f"{key}."
        }
        for key, tensor in {**self.task_state(self.current_task), **trained}.items():
            if not bool(tensor.isfinite().all()):
                raise TrainingError(
                    f"{key!r} of task {self.current_task!r} is not finite, so it is not committed: go back to an "
                    "earlier checkpoint, or remove_task and train it anew."
                )
