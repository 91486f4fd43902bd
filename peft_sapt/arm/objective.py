"""What attentive reflection asks of the attention: old tasks keep theirs, and the new task gets its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pool.view import Pool
from .progress import counted

DRAWN_ROWS, LEAST_DRAWN = 512, 16  # in a step of all old tasks of which no row is stored; of each at least


def replay_divergence(log_weights: Tensor, target: Tensor) -> Tensor:
    """KL(target || attention), mean over rows (SAPT, Eq. 7).

    Args:
        log_weights: log attention on one old task's replay rows, [n, T].
        target: that task's mean attention at its commit, padded with 0 for newer tasks, [T].
    """
    return (torch.xlogy(target, target) - target * log_weights).sum(dim=-1).mean()


def floor_shortfall(log_weights: Tensor, floor: float) -> Tensor:
    """Mean of max(0, log floor - log w_new) over rows; log_weights [n, T], newest task last.

    The balance to the replay term, which by itself takes all weight from the new task: a new block starts at zero and
    so earns no gradient that would hold its weight. Above the floor it is silent, which leaves room for related old
    blocks.
    """
    return F.relu(math.log(floor) - log_weights[:, -1]).mean()


def attention_loss(
    pool: Pool,
    current: Tensor,
    *,
    kl_weight: float = 1.0,
    floor_weight: float = 1.0,
    new_task_floor: float = 0.9,
    own_target: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """``kl_weight * mean_i KL_i + floor_weight * shortfall`` for a pool of at least two tasks; a scalar.

    The divergence is that of the paper (SAPT, section 3.3); the floor is ours, without which the new task loses its
    weight.
    The replay terms are averaged over the old tasks, so one weight means the same at any length of the stream; the
    loss belongs to an optimizer step, not to a micro-batch, so it means the same under any gradient accumulation.

    An old task without replay rows is replayed by fresh draws from its statistics; as many from the current task's own
    then join its prompts.

    Args:
        current: pooled prompts of the task under training, [n, d].
        own_target: attention that the current task is to keep, [T]; its KL then takes the place of the shortfall.
        seed: of the draws.
    """
    replay = pool.memory.replay(pool.adapter)[:-1]
    targets = pool.memory.targets(pool.adapter)[:-1]  # [T - 1, T]
    each = max(LEAST_DRAWN, DRAWN_ROWS // max(1, sum(not len(rows) for rows in replay)))
    wanted = [0 if len(rows) else each for rows in replay]
    if any(wanted) or pool.adapter in pool.statistics.reopened:
        drawn = pool.statistics.draw(pool.adapter, [*wanted, len(current)], torch.Generator().manual_seed(seed))
        replay = [rows if len(rows) else fresh for rows, fresh in zip(replay, drawn, strict=False)]
        current = torch.cat([current.to(targets), drawn[-1]])
    pooled = torch.cat([*replay, current.to(targets)])
    *old, new = pool.router.log_weights(pool.adapter, pooled).split([*(len(r) for r in replay), len(current)])
    terms = [replay_divergence(lw, target) for lw, target in zip(old, targets, strict=True) if len(lw)]
    divergence = torch.stack(terms).mean() if terms else new.new_zeros(())
    own = floor_shortfall(new, new_task_floor) if own_target is None else replay_divergence(new, own_target)
    return kl_weight * divergence + floor_weight * own


def align_attention(
    pool: Pool,
    current: Tensor,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int,
    kl_weight: float = 1.0,
    floor_weight: float = 1.0,
    new_task_floor: float = 0.9,
    own_target: Tensor | None = None,
) -> float:
    """Fit query projection and newest key to [`attention_loss`] alone, at a falling rate; returns the last loss.

    The language model does not run: pooled prompts are constants, so a step costs a few small matrix products. Done
    before the first training step, it gives the new block weight to learn with from the start; done after the last
    one, with ``own_target``, it undoes what the language model's gradient did to the attention of old tasks.

    Args:
        current: pooled prompts of the task under training, [n, d].
        steps: of AdamW without decay; batch_size: rows of ``current`` in each.
        kl_weight, floor_weight, new_task_floor, own_target: as in [`attention_loss`].
    """
    containers = (getattr(pool.router, name) for name in pool.router.adapter_layer_names)
    parameters = [p for container in containers for p in container[pool.adapter].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    loss = torch.zeros(())
    for step in counted(range(steps), f"{pool.current_task}: fitting the attention, steps", steps):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        rows = torch.randperm(len(current), generator=order)[:batch_size].to(current.device)
        loss = attention_loss(
            pool,
            current[rows],
            kl_weight=kl_weight,
            floor_weight=floor_weight,
            new_task_floor=new_task_floor,
            own_target=own_target,
            seed=seed + step,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
