"""ProgPrompt: a soft prompt for each task, put before those of all older tasks, which are frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..learner import Bench
from ..streams import Row
from .prefixed import PrefixedModel, PromptMethod


class Progressive(nn.Module):
    """[P_k, ..., P_1], newest first, the same for every row (Razdaibiedina et al., 2023, section 3.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ParameterList()
        self.used: int | None = None  # of the oldest prompts; all by default

    def grow(self, prompt: Tensor) -> None:
        """Freeze what is there and put a new prompt [P, d] before it."""
        self.prompts.requires_grad_(False)
        self.prompts.append(nn.Parameter(prompt))

    def forward(self, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        prompts = torch.cat(list(self.prompts)[: self.used][::-1])  # [k P, d]
        return prompts.expand(len(input_ids), -1, -1)


class ProgPrompt(PromptMethod):
    """All prompts stand before every row, since no task is named at test time: that is how others compare with it.

    Source: Razdaibiedina et al., *Progressive Prompts: Continual Learning for Language Models*, ICLR 2023. Its
    residual network over the prompt while it trains, which is dropped afterwards, is left out.
    """

    title = "ProgPrompt"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.model = PrefixedModel(bench.fresh(adapts_input=True), Progressive())

    @property
    def virtual(self) -> Progressive:
        return self.model.virtual  # type: ignore[return-value]  # its own module

    def learn(self, name: str) -> None:
        self.virtual.used = None
        self.virtual.grow(self.start(self.bench.budget.virtual_tokens))
        self.train(name)


class ProgPromptKnown(ProgPrompt):
    """As its paper tests it: with the task named, a row gets its own task's prompt and the older ones."""

    title = "ProgPrompt, task known"
    knows_task = kept_apart = True

    def answers(self, name: str, rows: list[Row], **how: object) -> list[str]:
        self.virtual.used = list(self.bench.stream).index(name) + 1
        return super().answers(name, rows, **how)
