"""The closed-form router's arithmetic: ridge regression of the task on pooled prompts, from running sums alone.

A prompt's feature x is what SaptConfig.features says, standardised to mean 0 and variance 1, with a 1 appended:
D = d + 1. For each task t the pool keeps the mean m_t of its features, and for all tasks together
G = sum_t mean(x x^T). The scores of a prompt are those of the regression of one-hot task labels in which each task
weighs the same,

    scores(x) = x^T (G + ridge * tr(G) / D * I)^-1 [m_1 ... m_T],

which no order of the tasks changes (recursive least squares, computed again instead of recursively). Nothing of a
prompt is kept beside the sums, so that nothing has to be replayed. All of it is computed in float64.
"""

from __future__ import annotations

import math

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
    """The softest temperature that leaves ``task`` its share of the attention on its own rows, and on the quarter of
    them that it leads by least: those in a chat template, say, where it was trained on others.

    It has ``own_share`` there, times the share of rows that it leads, less a standard error: rows with another leader
    would only lose by a sharper softmax, and where no task can be told from another the weights stay even.

    Args:
        scores: [n, T] of rows of ``task``.
    """
    others = scores.clone()
    others[:, task] = -torch.inf
    nearest = (scores[:, task] - others.amax(dim=-1)).argsort()[: -(-len(scores) // 4)]
    return min(softest(scores, task, own_share), softest(scores[nearest], task, own_share))


def softest(scores: Tensor, task: int, own_share: float) -> float:
    """[`calibrated_temperature`] on these rows alone, [n, T]."""
    every = TEMPERATURES.to(scores.device)
    own = (scores / every[:, None, None]).softmax(dim=-1)[..., task].mean(dim=-1)  # [temperatures]
    led = (scores.argmax(dim=-1) == task).double().mean()
    sure = led - (led * (1 - led) / len(scores)).sqrt()
    enough = (own >= own_share * sure).nonzero().flatten()
    return float(every[int(enough[-1]) if len(enough) else 0])


def common_temperature(calibrated: Tensor, count: int, own_share: float = OWN_SHARE) -> Tensor:
    """One temperature for a pool of ``count`` tasks from those that its tasks calibrated, [T], 0 where none did.

    Of n tasks whose own score leads all others by a margin m, the own one has share p at the temperature
    m / log((n - 1) p / (1 - p)). A task that calibrated as the pool's n-th so tells its margin; the result is the
    temperature for their geometric mean among ``count`` tasks. NaN if no task calibrated. It runs in every forward, so
    that nothing here waits for the device.
    """
    known = calibrated > 0  # [T]
    places = torch.arange(1, len(calibrated) + 1, device=calibrated.device)  # n of each
    margins = calibrated.double().log() + _log_odds(places, own_share).log()
    mean = margins.masked_fill(~known, 0.0).sum() / known.sum()
    return (mean - math.log(math.log((max(count, 2) - 1) * (own_share / (1 - own_share))))).exp()


def _log_odds(count: Tensor, share: float) -> Tensor:
    return ((count.clamp(min=2) - 1) * (share / (1 - share))).double().log()
