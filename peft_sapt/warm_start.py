"""Starting a new task's block where the shared attention puts its prompts among the older blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import PromptError, TaskError
from .tasks import TaskPool


class WarmStart(TaskPool):
    """Transfer of knowledge into the block itself, beside the paper's transfer through the mixture."""

    def has_started(self) -> bool:
        """Whether the current task's block can be seen to have trained, or its router to know it."""
        adapter, attention = self.pool_name, self.attention
        if attention.closed_form(adapter) and attention.learned(adapter)[-1]:
            return True
        seen = self.prompt_router.routing.seen.get(adapter)
        return bool(seen) or any(module.has_trained(adapter) for module in self.pool_modules())

    @torch.no_grad()
    def warm_start(self, inputs: Iterable[Mapping[str, Tensor]] | Tensor) -> dict[str, float]:
        """Start the current task's fresh block at the mixture of the older ones, as its prompts' attention mixes them.

        A LoRA block becomes the nearest one of its rank to sum_t w_t s_t B_t A_t, a soft prompt sum_t w_t P_t, with
        w the mean attention over the older tasks alone. The block trains on from there; older blocks stay as they are.
        ``ArmCallback(warm_start=True)`` calls this before the first step. Without it, call it after ``add_task`` and,
        with a closed-form router, before ``fit_router``.

        Args:
            inputs: the task's training inputs, as batches (dicts with ``input_ids``, ...) or as pooled prompts [N, d].

        Returns:
            The share of each older task.

        Raises:
            TaskError: there is no older task, the current one is committed, has been trained or is known to the router
                already. Nothing is changed then.
            PromptError: no rows, or rows without prompt tokens.
        """
        adapter, attention = self.pool_name, self.attention
        self.refuse_sharded("warm_start")
        if len(self.tasks) == 1:
            raise TaskError(f"{self.current_task!r} is the pool's first task: there is no older block to start from.")
        if attention.committed(adapter)[-1]:
            raise TaskError(f"Task {self.current_task!r} is committed: only a fresh block can be started anew.")
        if attention.closed_form(adapter) and attention.learned(adapter)[-1]:
            raise TaskError(f"The router knows task {self.current_task!r} already: call warm_start before fit_router.")
        if self.has_started():
            raise TaskError(
                f"The block of task {self.current_task!r} has been trained, and warm_start would replace it: "
                "remove_task and add_task start it over."
            )
        pooled = self.pooled_prompts(inputs)
        if not len(pooled):
            raise PromptError("warm_start needs training prompts of the current task, and got none.")
        self.refuse_bad_rows("warm_start(inputs=...)", pooled)
        shares = attention.log_weights(pooled, adapter)[:, :-1].softmax(dim=-1).mean(dim=0)  # [T - 1]
        for module in self.pool_modules():
            module.start_at(adapter, shares)
        return dict(zip(self.tasks, shares.tolist(), strict=False))
