"""A frozen model with virtual tokens before its input, the ones that some function of the prompt gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..learner import train
from ..method import Method


class PrefixedModel(nn.Module):
    """Prompt tuning whose virtual tokens may differ from row to row.

    Args:
        base: the model, frozen here.
        virtual: a module that takes input_ids and a mask of the prompt's tokens, both [B, S], and gives embeddings
            [B, P, d]. Its parameters are what trains.

    Positions are counted over attended tokens, so that left padding between the virtual tokens and the row's own does
    not shift them (PEFT's PromptTuning leaves positions to the model); an encoder-decoder has them in its encoder.
    """

    def __init__(self, base: Any, virtual: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.virtual = virtual

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def config(self) -> Any:
        return self.base.config

    def inputs(self, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor | None) -> dict[str, Tensor]:
        embeddings = self.base.get_input_embeddings()(input_ids)  # [B, S, d]
        prompt = attention_mask if prompt_mask is None else prompt_mask
        virtual = self.virtual(input_ids, prompt).to(embeddings.dtype)  # [B, P, d]
        seen = attention_mask.new_ones(virtual.shape[:2])
        return {
            "inputs_embeds": torch.cat([virtual, embeddings], dim=1),
            "attention_mask": torch.cat([seen, attention_mask], dim=1),
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        sapt_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Output of the base model for batches of [`Collator`], whose mask keeps answers from ``virtual``."""
        inputs = self.inputs(input_ids, attention_mask, sapt_prompt_mask)
        if not self.base.config.is_encoder_decoder:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return self.base(**inputs, labels=labels, **kwargs)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Like the base model's: the prompt's tokens come first, except for an encoder-decoder."""
        inputs = self.inputs(input_ids, attention_mask, None)
        if self.base.config.is_encoder_decoder:
            return self.base.generate(**inputs, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, **kwargs)
        if prefix_allowed_tokens_fn is not None:
            inner = prefix_allowed_tokens_fn
            kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: inner(row, torch.cat([input_ids[row], ids]))
        return torch.cat([input_ids, self.base.generate(**inputs, **kwargs)], dim=1)


class PromptMethod(Method):
    """Base of the methods with virtual tokens, which train at the budget's rate and epochs for prompts."""

    model: PrefixedModel

    def start(self, count: int) -> Tensor:
        """Embeddings [count, d] of tokens drawn at random, from which soft prompts start (Lester et al., 2021)."""
        table = self.bench.base.get_input_embeddings().weight.detach()
        return table[torch.randint(len(table), (count,))].float().clone()

    def train(self, name: str, **how: Any) -> None:
        budget = self.bench.budget
        train(
            self.bench, self.model, name, [],
            lr=budget.prompt_lr, epochs=budget.prompt_epochs, marks_prompts=True, **how,
        )  # fmt: skip

    def stored_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.virtual.parameters())

    def save(self, folder: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(dict(self.model.virtual.state_dict()), Path(folder) / "virtual_tokens.safetensors")
