"""The closed-form router's arithmetic: ridge regression of the task on pooled prompts, from running sums alone.

A prompt's feature x is its mean token embedding, standardised to mean 0 and variance 1, with a 1 appended: D = d + 1.
For each task t the pool keeps the mean m_t of its features, and for all tasks together G = sum_t mean(x x^T). The
scores of a prompt are those of the regression of one-hot task labels in which each task weighs the same,

    scores(x) = x^T (G + ridge * tr(G) / D * I)^-1 [m_1 ... m_T],

which no order of the tasks changes (recursive least squares, computed anew instead of recursively). Nothing of a
prompt is kept beside the sums, so that nothing has to be replayed. All of it is computed in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

OWN_SHARE = 0.95  # of the attention, that calibration aims at; the rest is for related tasks
TEMPERATURES = torch.logspace(-2, 1, 181, dtype=torch.float64)


def features(pooled: Tensor) -> Tensor:
    """Mean-pooled prompts [n, d] -> features [n, d + 1] in float64."""
    x = F.layer_norm(pooled.double(), pooled.shape[-1:])
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def second_moment(x: Tensor) -> Tensor:
    """mean(x x^T) of features [n, D] -> [D, D]: what a task adds to G."""
    return x.mT @ x / len(x)


def regularised(gram: Tensor, ridge: float) -> Tensor:
    """``G + ridge * tr(G) / D * I`` [D, D] in float64."""
    wide = gram.double()
    return wide + ridge * wide.trace() / len(wide) * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def solve(gram: Tensor, means: Tensor, ridge: float) -> Tensor:
    """Regression weights [T, D] from G [D, D] and the tasks' means [T, D]; zero for tasks without sums (zero rows)."""
    if not bool(gram.any()):
        return torch.zeros_like(means.double())
    return torch.linalg.solve(regularised(gram, ridge), means.double().mT).mT


def left_out_scores(x: Tensor, gram: Tensor, means: Tensor, ridge: float, task: int) -> Tensor:
    """Scores [n, T] of rows that belong to ``task``, each by the regression without that row.

    With h = x^T (G + ...)^-1 x / n they are (score - h * label) / (1 - h), the leave-one-out identity of ridge
    regression at a fixed regulariser.
    """
    inverse = torch.linalg.inv(regularised(gram, ridge))
    h = ((x @ inverse) * x).sum(dim=-1, keepdim=True) / len(x)  # [n, 1]
    label = F.one_hot(torch.tensor(task, device=x.device), len(means)).double()
    return (x @ inverse @ means.double().mT - h * label) / (1 - h)


def calibrated_temperature(scores: Tensor, task: int, own_share: float = OWN_SHARE) -> float:
    """The temperature whose softmax of ``scores`` [n, T] has the least cross-entropy to ``own_share`` for ``task``.

    The rest of the target is spread over the other tasks, which keeps the weights soft where tasks are easily told
    apart, and at what the scores can support where they are not.
    """
    tasks = scores.shape[-1]
    target = torch.full((tasks,), (1 - own_share) / (tasks - 1), dtype=scores.dtype, device=scores.device)
    target[task] = own_share
    every = TEMPERATURES.to(scores.device)
    logs = (scores / every[:, None, None]).log_softmax(dim=-1)  # [temperatures, n, T]
    return float(every[(-(logs * target).sum(dim=-1).mean(dim=-1)).argmin()])
