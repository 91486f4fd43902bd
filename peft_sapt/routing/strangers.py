"""Which prompts no task claims: ridge regression on the tasks, with prompts that belong to none as further classes.

Everyday prompts, as a user types them, in each form that they may come in (bare, in the wrapper of a task's own
prompts, in the chat template), are one class each beside the T tasks. With x the features of a prompt and a 1
appended, the scores are those of the regression of one-hot labels in which each class weighs the same (see [`ridge`]),

    s(x) = W x,   W = [m_1 ... m_T+K]^T (sum_c E_c[x x^T] + ridge * tr / D * I)^-1,

where a task's part follows from its statistics alone. A prompt's margin for task t is ``s_t - max_k s_k`` over the K
classes of everyday prompts. A task claims a prompt whose margin is not below the limit; what no task claims is a
stranger. Limits come from prompts left out of the regression: so high that of everyday prompts in any form at most
``EVERYDAY_CLAIMED`` are claimed; but never so high that more than ``OWN_AWAY`` of a task's own prompts lie below,
which goes first where tasks and everyday prompts are alike. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moments, wide
from .ridge import solve as solved

RIDGE = 0.1  # regulariser, as a share of the features' mean variance
FOLDS = 4
OWN_AWAY = 0.005  # quantile of a task's own margins, left out, above which the limit never lies
DRAWN_AWAY = 0.05
EVERYDAY_CLAIMED = 0.05  # share of everyday prompts, left out, that may be claimed in the worst form


def with_one(features: Tensor) -> Tensor:
    """[n, d] -> [n, d + 1] in float64."""
    x = wide(features)
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


class Sums:
    """What a regression needs of some classes: the sum of their second moments [D, D], and their means [C, D]."""

    def __init__(self, gram: Tensor | float = 0.0, means: Sequence[Tensor] = ()) -> None:
        self.gram, self.means = gram, list(means)

    def of(self, gram: Tensor, mean: Tensor) -> Sums:
        """The same with one more class."""
        return Sums(self.gram + gram, [*self.means, mean])

    def task(self, moments: Moments) -> Sums:
        return self.of(moments.second_moment(), with_one(moments.mean))

    def rows(self, features: Tensor) -> Sums:
        x = with_one(features)
        return self.of(x.mT @ x / len(x), x.mean(dim=0))

    def solve(self) -> Tensor:
        """W [C, D]."""
        return solved(torch.as_tensor(self.gram), torch.stack(self.means), RIDGE)


def sums_of(tasks: Sequence[Moments], background: Sequence[Tensor]) -> Sums:
    found = Sums()
    for moments in tasks:
        found = found.task(moments)
    for rows in background:
        found = found.rows(rows)
    return found


def detector(moments: Sequence[Moments | None], background: Sequence[Tensor], width: int) -> Tensor:
    """W [T + K, width]; rows of zeros for tasks of which nothing is known."""
    known = [m for m in moments if m is not None]
    if not known:
        return torch.zeros(len(moments) + len(background), width, dtype=torch.float64)
    found = iter(sums_of(known, background).solve())
    rows = [torch.zeros(width, dtype=torch.float64) if m is None else next(found) for m in moments]
    return torch.stack([*(row.to(known[0].mean.device) for row in rows), *found])


def scores(features: Tensor, weights: Tensor) -> Tensor:
    """``W x`` of features [n, d]: [n, T + K], in float64."""
    return with_one(features) @ wide(weights).mT


def margins(features: Tensor, weights: Tensor, count: int) -> Tensor:
    """``s_t - max_k s_k`` of features [n, d] for each of ``count`` tasks: [n, count], in float64."""
    found = scores(features, weights)  # [n, T + K]
    return found[..., :count] - found[..., count:].amax(dim=-1, keepdim=True)


def are_strangers(features: Tensor, weights: Tensor, limits: Tensor) -> Tensor:
    """Which of the prompts [n, d] no task claims, [n]; ``weights`` [T + K, d + 1], ``limits`` [T, 1]."""
    count = len(limits)
    if len(weights) == count:
        return torch.zeros(len(features), dtype=torch.bool, device=features.device)
    return (margins(features, weights, count) < wide(limits).mT).all(dim=-1)


def folds_of(count: int) -> Tensor:
    """The fold of each of ``count`` rows, [count], by a permutation that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS


def left_out_margins(
    own: Tensor, groups: Tensor, others: Sequence[Moments], background: Sequence[Tensor], rank: int
) -> Tensor:
    """The best margin of each of a task's prompts [n, d], by a regression that has not seen it: [n'].

    Args:
        groups: the prompt that each row is, perhaps in several renderings, [n]: these are left out together. With less
            than two prompts there is nothing to tell, and n' is 0.
    """
    count = int(groups.max()) + 1 if len(groups) else 0
    numbers, rest, found = folds_of(count).to(own.device)[groups], sums_of(others, background), []
    for fold in range(FOLDS):
        kept, left = own[numbers != fold], own[numbers == fold]
        if not len(kept) or not len(left):
            continue
        weights = rest.task(Moments.of(kept, rank)).solve()  # the task's own comes last
        found_scores, last = scores(left, weights), len(others) + len(background)
        claimed = torch.cat([found_scores[:, : len(others)], found_scores[:, last:]], dim=1).amax(dim=1)
        found.append(claimed - found_scores[:, len(others) : last].amax(dim=1))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device=own.device)


def drawn_limits(tasks: Sequence[Moments], weights: Tensor, count: int) -> Tensor:
    """The quantile ``DRAWN_AWAY`` of the best margins of each task, [T], over ``count`` draws in place of its prompts,
    which stray further than these do.

    Args:
        weights: of the regression on ``tasks`` and everyday prompts, [T + K, d + 1].
    """
    generator, found = torch.Generator().manual_seed(0), []
    for own in tasks:
        found.append(margins(own.draws(count, generator), weights, len(tasks)).amax(dim=1).quantile(DRAWN_AWAY))
    return torch.stack(found)


def background_limit(tasks: Sequence[Moments], background: Sequence[Tensor]) -> float:
    """The margin that at most ``EVERYDAY_CLAIMED`` of everyday prompts, left out, exceed in their worst form."""
    known = sums_of(tasks, [])
    folds = [folds_of(len(rows)).to(rows.device) for rows in background]
    found: list[list[Tensor]] = [[] for _ in background]
    for fold in range(FOLDS):
        sums = known
        for rows, number in zip(background, folds, strict=True):
            sums = sums.rows(rows[number != fold])
        weights = sums.solve()
        for k, (rows, number) in enumerate(zip(background, folds, strict=True)):
            if bool((number == fold).any()):
                found[k].append(margins(rows[number == fold], weights, len(tasks)).amax(dim=-1))
    return max(float(torch.cat(margin).quantile(1 - EVERYDAY_CLAIMED)) for margin in found)
