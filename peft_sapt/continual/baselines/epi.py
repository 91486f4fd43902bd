"""EPI: a LoRA for each task, and the task of a prompt by its Mahalanobis distance to the tasks' statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..answering import answers
from ..bounds import PerTask
from ..learner import Bench
from ..method import Found
from ..streams import Row
from .features import Features

TINY = 1e-12  # of a variance, where all prompts are alike
SHRINKAGE = 0.1  # of ours: a few hundred rows cannot fill a covariance of as many dimensions


class Statistics:
    """Mean of each task's features and one covariance for all, kept as running sums in float64.

    Wang et al. (2023), section 3.2: task of x = argmin_t (f(x) - mu_t)^T Sigma^-1 (f(x) - mu_t), with Sigma the mean
    of the tasks' covariances weighted by rows. Before it is inverted it is shrunk: (1 - s) Sigma + s tr(Sigma) / d I.
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.scatter: Tensor | None = None
        self.rows = 0

    def add(self, features: Tensor) -> None:
        """Take in a task's features [N, d]."""
        values = features.double()
        mean = values.mean(dim=0)
        own = (values - mean).T @ (values - mean)
        self.means.append(mean)
        self.scatter = own if self.scatter is None else self.scatter + own
        self.rows += len(values)

    def distances(self, features: Tensor) -> Tensor:
        """Squared Mahalanobis distances [N, T] of features [N, d]."""
        assert self.scatter is not None
        covariance = self.scatter / self.rows
        width = len(covariance)
        even = torch.eye(width, dtype=covariance.dtype) * max(float(covariance.trace()) / width, TINY)
        precision = torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * even)
        apart = features.double()[:, None] - torch.stack(self.means)[None]  # [N, T, d]
        return torch.einsum("ntd,de,nte->nt", apart, precision, apart)


class EPI(PerTask):
    """Answers each prompt with the adapter of the nearest task; no old row is kept.

    Source: Wang et al., *Rehearsal-free Continual Language Learning via Efficient Parameter Isolation*, ACL 2023.
    """

    title = "EPI"
    kept_apart = knows_task = alone = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.features = Features(bench)
        self.statistics = Statistics()
        self.led: dict[str, float] = {}

    def learn(self, name: str) -> None:
        super().learn(name)
        self.statistics.add(self.features(self.bench.prompts(self.bench.stream[name]["train"])).cpu())

    def answers(self, name: str, rows: list[Row], **how: Any) -> list[str]:
        distances = self.statistics.distances(self.features(self.bench.prompts(rows)).cpu())
        nearest = distances.argmin(dim=1).tolist()
        own = list(self.bench.stream).index(name)
        self.led[name] = 100.0 * sum(i == own for i in nearest) / len(nearest)
        found: dict[int, str] = {}
        for task in sorted(set(nearest)):
            picked = [i for i, t in enumerate(nearest) if t == task]
            self.model.set_adapter(f"task_{task}")
            found |= zip(picked, answers(self.bench, self.model, [rows[i] for i in picked], **how), strict=True)
        return [found[i] for i in range(len(rows))]

    def after_stage(self, stage: int) -> None:
        self.routing = [self.led[name] for name in list(self.bench.stream)[: stage + 1]]

    def extra_results(self) -> Found:
        return {"routing": self.routing, "baseline": {"shrinkage": SHRINKAGE}}

    def stored_bytes(self) -> int:
        kept = [*self.statistics.means, *([] if self.statistics.scatter is None else [self.statistics.scatter])]
        return super().stored_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in kept)
