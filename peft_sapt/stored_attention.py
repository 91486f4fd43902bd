"""What a pool's attention says of the prompts it keeps: one row per task, computed from the saved tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import key_log_weights, query_of
from .closed_form import score_log_weights, softmax_temperature
from .config import SaptConfig

MAX_TASKS = 50  # beyond which nobody reads the matrix, and its T^2 numbers would outgrow what they describe


@torch.no_grad()
def stored_attention(config: SaptConfig, tensors: dict[str, Tensor]) -> list[list[float] | None] | None:
    """Mean attention of each task's stored prompts over the blocks, [T][T], rounded to four digits.

    For the learned attention these are the replay rows, for the closed form the mean of the task's features. A task of
    which nothing is stored has None for a row.

    Args:
        tensors: of the pool by their names in the file, whole.

    Returns:
        None where the pool has more than ``MAX_TASKS`` tasks, or its tensors are not here.
    """
    tasks = config.tasks or []
    own = {name: t.detach().float() for name, t in tensors.items() if "shared_attention." in name}
    parts = {name.split(".")[-2]: t for name, t in own.items() if name.endswith(".weight")}
    if len(tasks) > MAX_TASKS or any(t.device.type == "meta" for t in parts.values()) or "sapt_key" not in parts:
        return None
    keys = torch.cat([parts[name] for name in ("sapt_old_keys", "sapt_key") if name in parts])  # [T, d]
    if config.closed_form:
        return closed_rows(keys, parts["sapt_solved"], parts["sapt_temperatures"])
    replay, counts = parts.get("sapt_replay"), config.replay_rows or []
    if replay is None:
        return [None for _ in tasks]
    down, up, norm = (parts[name] for name in ("sapt_query_down", "sapt_query_up", "sapt_query_norm"))
    bias = next(t for name, t in own.items() if name.endswith("sapt_query_norm.bias"))
    q = query_of(replay, down, up, norm, bias, config.query_activation == "between")  # [N, d]
    w = key_log_weights(q, keys, config.temperature).exp()  # [N, T]
    return [rounded(rows.mean(dim=0)) if len(rows) else None for rows in w.split(counts)]


def closed_rows(means: Tensor, solved: Tensor, temperatures: Tensor) -> list[list[float] | None]:
    """Weights of the mean prompt of each task, None for a task that the router has not seen."""
    seen = means[:, -1] != 0  # [T]
    scores = means.double() @ solved.double().mT  # [T, T]
    w = score_log_weights(scores, means, softmax_temperature(temperatures)).exp()
    return [rounded(row) if known else None for row, known in zip(w, seen.tolist(), strict=True)]


def rounded(row: Tensor) -> list[float]:
    return [round(value, 4) for value in row.tolist()]
