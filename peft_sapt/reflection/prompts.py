"""The current task's prompts, as the callback reads them from training batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import ReflectionError
from ..model import SaptModel
from ..pooling import prompt_tokens, read_prompts


def read_task(pool: SaptModel, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, list[list[int]]]:
    """Pooled prompts [n, d] of all rows, and their token ids where the batches have ``input_ids``.

    Raises:
        ReflectionError: there are no batches.
    """
    pooled: list[Tensor] = []
    prompts: list[list[int]] = []
    device = pool.attention.weight.device
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        with torch.no_grad():
            found = read_prompts(pool.model, pool.pool_config, inputs, training=False)
        pooled.append(found.pooled[~found.pooled[:, 0].isnan()])  # packed rows may end in padding
        if inputs.get("input_ids") is not None:
            prompts += prompt_tokens(inputs["input_ids"], found)
    if not pooled:
        raise ReflectionError("The training set is empty.")
    return torch.cat(pooled), prompts
