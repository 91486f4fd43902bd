"""What a prompt is told by: one vector per prompt, pooled from token embeddings or from hidden states of the base.

    max     element-wise max of the token embeddings, as it is (SAPT, section 3.2)          [d]
    mean    their mean, standardised                                                         [d]
    both    mean and max side by side, each standardised                                     [2 d]
    hidden  mean hidden state above some layers of the frozen base, standardised, see hidden [h]

Standardised is a vector over its own width, to mean 0 and variance 1: nothing is learned from data, so that a prompt's
feature is the same forever, whatever tasks come.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SaptConfig
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
        self.known: dict[tuple[int, bytes], Tensor] = {}  # by layer and digest of the tokens, [h] each
        self.known_of: Any = None  # the weights that these were read by

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "known": {}, "known_of": None}

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
        layer, width = config.features_layer or 1, config.feature_dim or 0
        if remember and ids is not None:
            return self.remembered(module, config, layer, ids, embeddings, mask, segments)
        return standardised(hidden_features(module, self.state, layer, width, embeddings, mask, segments))

    def remembered(
        self,
        module: nn.Module,
        config: SaptConfig,
        layer: int,
        ids: Tensor,
        embeddings: Tensor,
        mask: Tensor,
        segments: Tensor | None,
    ) -> Tensor:
        """Hidden features, computed only for prompts that are not known yet."""
        self.forget_if_changed(module)
        rows, _, count = rows_of_segments(mask, segments)
        ends = torch.bincount(rows, minlength=count).cumsum(0).tolist()
        tokens, starts = ids[mask].cpu().numpy(), [0, *ends[:-1]]
        keys = [(layer, hashlib.sha256(tokens[a:b].tobytes()).digest()) for a, b in zip(starts, ends, strict=True)]
        known = {key: self.known.get(key) for key in keys}
        new = torch.tensor([known[key] is None for key in keys], device=mask.device)
        if bool(new.any()):
            own = (
                torch.arange(count, device=mask.device).unsqueeze(1).expand_as(mask) if segments is None else segments
            )
            width, wanted = config.feature_dim or 0, mask & new[own]
            found = standardised(hidden_features(module, self.state, layer, width, embeddings, wanted, own))
            for i in new.nonzero().flatten().tolist():
                feature = known[keys[i]] = found[i].clone()
                if len(self.known) * feature.nbytes < REMEMBERED_BYTES:
                    self.known[keys[i]] = feature
        return torch.stack([known[key] for key in keys])  # type: ignore[misc]  # none is missing now

    def forget_if_changed(self, module: nn.Module) -> None:
        """Forget all prompts if weights of the base have been written to, moved or cast since."""
        frozen = [p for name, p in module.named_parameters() if "sapt_" not in name]
        versions = sum(0 if p.is_inference() else p._version for p in frozen)
        first = frozen[0] if frozen else None
        state = versions, None if first is None else (first.data_ptr(), first.dtype, first.device)
        if state != self.known_of:
            self.known, self.known_of = {}, state
