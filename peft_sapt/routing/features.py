"""What a prompt is told by: one vector per prompt, pooled from token embeddings or from hidden states of the base.

    max     element-wise max of the token embeddings, as it is (SAPT, section 3.2)          [d]
    mean    their mean, standardised                                                         [d]
    both    mean and max side by side, each standardised                                     [2 d]
    hidden  mean hidden state above some layers of the frozen base, standardised, see hidden [h]

Standardised is a vector over its own width, to mean 0 and variance 1: nothing is learned from data, so that a prompt's
feature is the same forever, whatever tasks come.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SaptConfig
from ..pool_module import input_embeddings
from .forward_state import ForwardState
from .hidden import hidden_features
from .packing import max_pool_segments, mean_pool_segments, rows_of_segments

REMEMBERED_BYTES = 64 * 2**20  # of features of prompts seen in training


def mean_pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Mean over the positions where ``mask`` is True: [B, S, d] -> [B, d] in float32; rows without any are NaN."""
    summed = embeddings.float().masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)
    return summed / mask.sum(dim=1, keepdim=True)  # 0 / 0 is NaN


def max_pool(embeddings: Tensor, mask: Tensor) -> Tensor:
    """Element-wise max over the positions where ``mask`` is True (SAPT, section 3.2).

    Args:
        embeddings: [B, S, d].
        mask: [B, S], bool.

    Returns:
        [B, d] in float32; rows without any position are NaN, so that nobody mistakes them for a prompt.
    """
    masked = embeddings.float().masked_fill(~mask.unsqueeze(-1), -torch.inf)
    pooled = masked.amax(dim=1)
    return pooled.masked_fill(~mask.any(dim=1, keepdim=True), torch.nan)


def standardised(x: Tensor) -> Tensor:
    """``x`` [..., d] with mean 0 and variance 1 over its own width."""
    return F.layer_norm(x, x.shape[-1:])


def embedding_features(kind: str, embeddings: Tensor, mask: Tensor, segments: Tensor | None) -> Tensor:
    """Features of the ``kind`` max, mean or both: [B, S, d] -> [N, feature_dim] in float32; NaN without a token.

    Args:
        mask: True on prompt tokens, [B, S].
        segments: of packed rows, the prompt (0..N-1) that each token belongs to, [B, S]; else None, and N = B.
    """

    def mean() -> Tensor:
        found = mean_pool(embeddings, mask) if segments is None else mean_pool_segments(embeddings, mask, segments)
        return standardised(found)

    def largest() -> Tensor:
        return max_pool(embeddings, mask) if segments is None else max_pool_segments(embeddings, mask, segments)

    if kind == "max":
        return largest()
    return mean() if kind == "mean" else torch.cat([mean(), standardised(largest())], dim=-1)


class PromptReader:
    """Computes the features of prompts for the pools on one base model, and remembers those seen in training."""

    def __init__(self, state: ForwardState) -> None:
        self.state = state
        self.known: OrderedDict[tuple[int, tuple[int, ...]], Tensor] = OrderedDict()  # by layer and tokens, [h] each
        self.known_of: Any = None  # the weights that these were read by

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "known": OrderedDict(), "known_of": None}

    def features(
        self,
        module: nn.Module,
        config: SaptConfig,
        ids: Tensor | None,
        embeddings: Tensor,
        mask: Tensor,
        segments: Tensor | None,
        remember: bool,
    ) -> Tensor:
        """Features [N, feature_dim] of the prompts in a batch, float32; NaN where one is empty.

        Args:
            module: the base model, or its encoder.
            ids, embeddings: of all tokens, [B, S] and [B, S, d].
            mask, segments: as in [`embedding_features`].
            remember: the rows are training rows, which will come again.
        """
        if config.features != "hidden":
            return embedding_features(str(config.features), embeddings, mask, segments)
        layer = config.features_layer or 1
        if ids is None or not remember:
            return standardised(hidden_features(module, self.state, layer, embeddings, mask, segments))
        return self.remembered(module, layer, ids, embeddings, mask, segments)

    def remembered(
        self, module: nn.Module, layer: int, ids: Tensor, embeddings: Tensor, mask: Tensor, segments: Tensor | None
    ) -> Tensor:
        """Hidden features, computed only for prompts that are not known yet."""
        table = input_embeddings(module)
        weight: Any = next(iter(() if table is None else table.parameters()), None)
        version = None if weight is None else (weight.data_ptr(), weight.dtype, weight.device, weight._version)
        if version != self.known_of:
            self.known.clear()
            self.known_of = version
        rows, _, count = rows_of_segments(mask, segments)
        tokens: list[list[int]] = [[] for _ in range(count)]
        for row, token in zip(rows.tolist(), ids[mask].tolist(), strict=True):
            tokens[row].append(token)
        keys = [(layer, tuple(row)) for row in tokens]
        new = torch.tensor([key not in self.known for key in keys], device=mask.device)
        if bool(new.any()):
            own = (
                torch.arange(count, device=mask.device).unsqueeze(1).expand_as(mask) if segments is None else segments
            )
            wanted = mask & new[own]
            found = standardised(hidden_features(module, self.state, layer, embeddings, wanted, own))
            for i in new.nonzero().flatten().tolist():
                self.known[keys[i]] = found[i]
        result = torch.stack([self.known[key] for key in keys])
        while len(self.known) * result[0].nbytes > REMEMBERED_BYTES:
            self.known.popitem(last=False)
        return result
