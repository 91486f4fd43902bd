"""The closed-form router in a pool: its sums as parts of the pool, and the weights that follow from them.

Its "key" of a task is the mean of the task's features, which is stored, frozen, stacked and removed like a learned
key; a key of zeros belongs to a task that the router has not seen.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ridge
from .config import SaptConfig
from .pool import Linears, linear_from

UNCALIBRATED = 0.25  # temperature of pools in which no task has been calibrated, about what real prompts need


class ClosedForm:
    """Mixin of [`SharedAttention`] for adapters with ``router="ridge"``.

    Per adapter, all frozen and in float32:
        - ``sapt_key`` [1, d + 1], ``sapt_old_keys`` [T - 1, d + 1]: means of the features of each task's prompts.
        - ``sapt_gram`` [d + 1, d + 1]: the sum over tasks of their features' second moments. A removed task's part
          stays in it, as rows that belong to no task.
        - ``sapt_solved`` [T, d + 1]: the regression that follows from these.
        - ``sapt_temperatures`` [T, 1]: the temperature that each task calibrated, 0 where none did. The softmax uses
          what they have in common, see [`ridge.common_temperature`].
    """

    sapt_key: Linears
    sapt_old_keys: Linears
    sapt_gram: Linears
    sapt_solved: Linears
    sapt_temperatures: Linears
    configs: MutableMapping[str, SaptConfig]

    def closed_form(self, adapter: str) -> bool:
        return self.configs[adapter].closed_form

    def build_sums(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Empty sums for the tasks in ``config``; random ones with ``init_weights=False``."""
        width, count = (config.token_dim or 0) + 1, len(config.tasks or [])
        means, gram = torch.zeros(count, width), torch.zeros(width, width)
        if not config.init_weights:
            x = ridge.features(torch.randn(count * 8, width - 1)).view(count, 8, width)
            means, gram = x.mean(dim=1).float(), sum(map(ridge.second_moment, x)).float()  # type: ignore[union-attr]
        means, gram = (t.to(device or "cpu") for t in (means, gram))
        self.sapt_key[adapter] = linear_from(means[-1:])
        if count > 1:
            self.sapt_old_keys[adapter] = linear_from(means[:-1])
        self.sapt_gram[adapter] = linear_from(gram)
        self.sapt_temperatures[adapter] = linear_from(torch.zeros(count, 1, device=device))
        self.sapt_solved[adapter] = linear_from(ridge.solve(gram, means, config.ridge).float())

    def means(self, adapter: str) -> Tensor:
        """Means of all tasks' features, oldest first, [T, d + 1]; zero where the router saw nothing."""
        parts = [c[adapter].weight.data for c in (self.sapt_old_keys, self.sapt_key) if adapter in c]
        return torch.cat(parts)

    def learned(self, adapter: str) -> list[bool]:
        """For each task, oldest first, whether the router has seen its prompts."""
        return (self.means(adapter)[:, -1] != 0).tolist()

    def solve(self, adapter: str) -> None:
        solved = ridge.solve(self.sapt_gram[adapter].weight.data, self.means(adapter), self.configs[adapter].ridge)
        self.sapt_solved[adapter] = linear_from(solved.float())

    @torch.no_grad()
    def learn(self, adapter: str, pooled: Tensor) -> None:
        """Add the sums of the newest task's prompts, mean-pooled, [n, d], solve, and calibrate."""
        x, gram = ridge.features(pooled), self.sapt_gram[adapter].weight.data
        self.sapt_key[adapter].weight.data.copy_(x.mean(dim=0, keepdim=True))
        gram.add_(ridge.second_moment(x))
        self.solve(adapter)
        count = len(self.configs[adapter].tasks or [])
        if count > 1 and len(x) > 1:
            means, task = self.means(adapter), count - 1
            scores = ridge.left_out_scores(x, gram, means, self.configs[adapter].ridge, task)
            self.sapt_temperatures[adapter].weight.data[-1] = ridge.calibrated_temperature(scores, task)

    def resize(self, adapter: str, kept: list[int]) -> None:
        """Sums that are not stacks follow their tasks: ``kept`` are indices of before, -1 for a new task."""
        old = self.sapt_temperatures[adapter].weight.data
        rows = [old[i] if i >= 0 else old.new_zeros(1) for i in kept]
        self.sapt_temperatures[adapter] = linear_from(torch.stack(rows))
        self.solve(adapter)

    def scores(self, adapter: str, pooled: Tensor) -> Tensor:
        """How much each prompt looks like each task, about 1 for its own and 0 for others: [..., d] -> [..., T]."""
        return ridge.features(pooled) @ self.sapt_solved[adapter].weight.data.double().mT

    def temperature(self, adapter: str) -> Tensor:
        """Of the softmax, a float64 scalar."""
        return softmax_temperature(self.sapt_temperatures[adapter].weight.data)

    def closed_log_weights(self, adapter: str, pooled: Tensor) -> Tensor:
        """Log of softmax(scores / temperature) over the tasks that the router has seen, float32; uniform if none."""
        return score_log_weights(self.scores(adapter, pooled), self.means(adapter), self.temperature(adapter))

    def is_far(self, adapter: str, pooled: Tensor) -> Tensor | None:
        """Rows [B] whose best score is below ``SaptConfig.fallback``, which the base model is to answer."""
        limit = self.configs[adapter].fallback
        return None if limit is None else self.scores(adapter, pooled).amax(dim=-1) < limit


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
