"""The router in closed form: its sums as parts of the pool, and the weights that follow from them.

What it keeps of a task is the mean of the task's features, which is stored, stacked and removed like a learned key; a
mean of zeros belongs to a task that the router has not seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import SaptConfig
from ..errors import SaptError, TaskError
from ..pool_module import Linears, linear_from
from . import ridge
from .router import Router, feature_dim_of, stacked
from .statistics import is_removed

UNCALIBRATED = 0.25  # temperature of pools in which no task has been calibrated, about what real prompts need


class RidgeRouter(Router):
    """Ridge regression of the task on features of prompts; keeps sums only, needs no replay. See [`ridge`].

    Per adapter, all frozen and in float32:
        - ``sapt_mean`` [1, d + 1], ``sapt_old_means`` [T - 1, d + 1]: means of the features of each task's prompts.
        - ``sapt_gram`` [d + 1, d + 1]: the sum over tasks of their features' second moments. A removed task's part
          stays in it, as rows that belong to no task.
        - ``sapt_solved`` [T, d + 1]: the regression that follows from these, and from the prompts of no task that the
          pool knows.
        - ``sapt_temperatures`` [T, 1]: the temperature that each task calibrated, 0 where none did. The softmax uses
          what they have in common, see [`ridge.common_temperature`].
    """

    kind = "ridge"
    module_name = "ridge_router"
    needs_replay = False
    description = "ridge regression in closed form (one mean per task)"
    keeps = "Of the prompts the pool keeps the mean of their features per task and one matrix for all."

    other_param_names = ("sapt_mean", "sapt_old_means", "sapt_gram", "sapt_solved", "sapt_temperatures")
    stacks = {"sapt_mean": "sapt_old_means"}
    sapt_mean: Linears
    sapt_old_means: Linears
    sapt_gram: Linears
    sapt_solved: Linears
    sapt_temperatures: Linears

    def __init__(self) -> None:
        super().__init__()
        self.ready: dict[str, str | None] = {}  # by adapter: the newest task, once it is known to be fitted
        self.before: dict[str, tuple[Tensor, Tensor]] = {}  # by adapter: mean and sums when its task was reopened

    @classmethod
    def check_config(cls, config: SaptConfig) -> None:
        if config.pool_padding:
            raise SaptError("SaptConfig.pool_padding reproduces the learned attention: it needs router='attention'.")

    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Empty sums for the tasks in ``config``; random ones with ``init_weights=False``."""
        self.configs[adapter] = config
        width, count = feature_dim_of(config) + 1, len(config.tasks)
        means, gram = torch.zeros(count, width), torch.zeros(width, width)
        if not config.init_weights:
            x = ridge.features(torch.randn(count * 8, width - 1)).view(count, 8, width)
            means, gram = x.mean(dim=1).float(), torch.stack([*map(ridge.second_moment, x)]).sum(dim=0).float()
        means, gram = (t.to(device or "cpu") for t in (means, gram))
        self.sapt_mean[adapter] = linear_from(means[-1:])
        if count > 1:
            self.sapt_old_means[adapter] = linear_from(means[:-1])
        self.sapt_gram[adapter] = linear_from(gram)
        self.sapt_temperatures[adapter] = linear_from(torch.zeros(count, 1, device=device))
        self.sapt_solved[adapter] = linear_from(ridge.solve(gram, means, config.ridge).float())

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        return {"sapt_mean": torch.zeros(1, feature_dim_of(self.configs[adapter]) + 1)}

    # --- routing --------------------------------------------------------------------------------------------------

    @staticmethod
    def log_weights_of(state: Mapping[str, Tensor], config: SaptConfig, pooled: Tensor) -> Tensor:
        """Log of softmax(scores / temperature) over the tasks that the router has seen, float32; uniform if none."""
        scores = scores_of(pooled, state["sapt_solved"])
        return score_log_weights(scores, means_in(state), softmax_temperature(state["sapt_temperatures"]))

    @classmethod
    def stored_weights(
        cls, state: Mapping[str, Tensor], config: SaptConfig, replay: list[Tensor]
    ) -> list[Tensor | None]:
        """Weights of each task's mean features, which is what is stored; None for a task that was not seen."""
        means = means_in(state)  # [T, d + 1]
        scores = means.double() @ state["sapt_solved"].double().mT  # [T, T]
        w = score_log_weights(scores, means, softmax_temperature(state["sapt_temperatures"])).exp()
        return [row if seen else None for row, seen in zip(w, seen_in(means), strict=True)]

    def scores(self, adapter: str, pooled: Tensor) -> Tensor:
        """How much each prompt looks like each task, about 1 for its own and 0 for others: [..., d] -> [..., T]."""
        return scores_of(pooled, self.sapt_solved[adapter].weight.data)

    def temperature(self, adapter: str) -> Tensor:
        """Of the softmax, a float64 scalar."""
        return softmax_temperature(self.sapt_temperatures[adapter].weight.data)

    # --- a task's life --------------------------------------------------------------------------------------------

    def means(self, adapter: str) -> Tensor:
        """Means of all tasks' features, oldest first, [T, d + 1]; zero where the router saw nothing."""
        return means_in(self.state_of(adapter)).detach()

    def fitted(self, adapter: str) -> list[bool]:
        """For each task, oldest first, whether the router has seen its prompts."""
        return seen_in(self.means(adapter))

    def is_fitted(self, adapter: str) -> bool:
        return self.fitted(adapter)[-1]

    def reopen(self, adapter: str) -> None:
        """From now on [`fit`] adds prompts to those that the task has been fitted to."""
        self.before.pop(adapter, None)
        if self.is_fitted(adapter) and adapter in self.hooks.statistics.reopened:
            parts = self.sapt_mean[adapter].weight.data, self.sapt_gram[adapter].weight.data
            self.before[adapter] = (parts[0].clone(), parts[1].clone())

    def is_reopened(self, adapter: str) -> bool:
        """Whether the newest task has been fitted and opened again, so that more of its prompts may come."""
        return adapter in self.before and adapter in self.hooks.statistics.reopened

    def check_ready(self, adapter: str) -> None:
        """The router must know a task before its block trains, or the block would get no weight."""
        task = self.configs[adapter].task_name
        if self.ready.get(adapter) == task:
            return
        if not self.is_fitted(adapter):
            raise TaskError(
                f"The router has not seen prompts of task {task!r}: train with ArmCallback, which shows them to it, "
                "or call model.fit_router(batches) before training."
            )
        self.ready[adapter] = task

    def check_fit(self, adapter: str) -> None:
        if self.is_fitted(adapter) and not self.is_reopened(adapter):
            raise TaskError(
                f"The router has seen task {self.configs[adapter].task_name!r} already, and keeps no rows that could "
                "be replaced: remove_task and add_task start it over."
            )

    @torch.no_grad()
    def fit(self, adapter: str, pooled: Tensor) -> None:
        """Add the sums of the newest task's prompts [n, d], solve, calibrate; older tasks' sums keep their bytes."""
        x, gram = ridge.features(pooled), self.sapt_gram[adapter].weight.data
        mean, moment, share = x.mean(dim=0, keepdim=True), ridge.second_moment(x), 1.0
        if self.is_reopened(
            adapter
        ):  # what was known of the task is in the sums; its statistics tell how much of them
            known = self.hooks.statistics.reopened[adapter]
            share = len(x) / (len(x) + known.rows)
            mean = (1 - share) * self.before[adapter][0].to(mean) + share * mean
            gram.copy_(self.before[adapter][1])
            moment = moment - known.second_moment().to(moment)
        self.sapt_mean[adapter].weight.data.copy_(mean)
        gram.add_(share * moment)
        self.solve(adapter)
        count = len(self.configs[adapter].tasks)
        if count > 1 and len(x) > 1:
            means, task = self.means(adapter), count - 1
            every = self.whole_gram(adapter)
            scores = ridge.left_out_scores(x, every, means, self.configs[adapter].ridge, task)
            self.sapt_temperatures[adapter].weight.data[-1] = ridge.calibrated_temperature(scores, task)

    def solve(self, adapter: str) -> None:
        solved = ridge.solve(self.whole_gram(adapter), self.means(adapter), self.configs[adapter].ridge)
        self.sapt_solved[adapter] = linear_from(solved.float())

    def whole_gram(self, adapter: str) -> Tensor:
        """``sapt_gram`` and what prompts that belong to no task add to it, a class of its own in each form; a removed
        task's are in it."""
        gram, statistics = self.sapt_gram[adapter].weight.data.double(), self.hooks.statistics
        for rows, form in zip(statistics.background(adapter), self.configs[adapter].background_forms, strict=True):
            if not is_removed(form):
                gram = gram + ridge.second_moment(ridge.features(rows)).to(gram)
        return gram

    def on_background(self, adapter: str) -> None:
        if any(self.fitted(adapter)):
            self.solve(adapter)

    def resize(self, adapter: str, kept: list[int]) -> None:
        old = self.sapt_temperatures[adapter].weight.data
        rows = [old[i] if i >= 0 else old.new_zeros(1) for i in kept]
        self.sapt_temperatures[adapter] = linear_from(torch.stack(rows))
        self.ready.pop(adapter, None)
        self.before.pop(adapter, None)
        self.solve(adapter)

    def on_commit(self, adapter: str, pooled: Tensor) -> None:
        """A task that was never fitted is fitted now, from the rows that training saw."""
        if not self.is_fitted(adapter):
            self.fit(adapter, pooled)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.ready.pop(adapter_name, None)


def means_in(state: Mapping[str, Tensor]) -> Tensor:
    return stacked(state, "sapt_mean", "sapt_old_means")


def seen_in(means: Tensor) -> list[bool]:
    return (means[:, -1] != 0).tolist()


def scores_of(pooled: Tensor, solved: Tensor) -> Tensor:
    """Features of prompts [..., d] times the regression [T, d + 1]: [..., T], float64."""
    return ridge.features(pooled) @ solved.double().mT


def softmax_temperature(calibrated: Tensor) -> Tensor:
    """One temperature, a float64 scalar, from those that the tasks calibrated, [T, 1]; a default if none did."""
    every = calibrated.flatten()
    found = ridge.common_temperature(every, len(every))
    return found.masked_fill(found.isnan(), UNCALIBRATED)


def score_log_weights(scores: Tensor, means: Tensor, temperature: Tensor) -> Tensor:
    """Log of softmax(scores [..., T] / temperature) over the tasks whose means [T, d + 1] are not zero, float32."""
    unknown = means[:, -1] == 0  # [T]
    scores = (scores / temperature).masked_fill(unknown & ~unknown.all(), -torch.inf)
    return F.log_softmax(scores, dim=-1).float()
