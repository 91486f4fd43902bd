"""Features of a prompt that no method changes: the mean of the untouched base model's last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..learner import Bench
from ..prompts import left_padded


class Features(nn.Module):
    """[N, d] for N prompts of token ids; each prompt is run alone, once, and remembered."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        known = bench.remembering  # which has run the lower layers of most prompts already
        # In a list, so that no module registers, saves or trains it.
        self._base: list[Any] = [bench.base if known is None else known]
        self.pad = bench.tokenizer.pad_token_id
        self.known: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def forward(self, prompts: list[list[int]]) -> Tensor:
        return torch.stack([self.of(tuple(prompt)) for prompt in prompts])

    def of(self, prompt: tuple[int, ...]) -> Tensor:
        if prompt not in self.known:
            base = self._base[0]
            body = base.get_encoder() if base.config.is_encoder_decoder else base.get_decoder()
            batch = {k: v.to(base.device) for k, v in left_padded([list(prompt)], self.pad).items()}
            self.known[prompt] = body(**batch).last_hidden_state[0].mean(dim=0).float()
        return self.known[prompt]
