"""Reading the attention of the active pool: the weights and the pooled prompts of given inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import SharedAttention
from .config import SaptConfig
from .errors import TaskError, WeightsError
from .pooling import read_prompts
from .routing import PromptRouter


class PromptReader:
    """The active pool of a [`SaptModel`], and what its attention says of a prompt."""

    model: nn.Module
    peft_config: dict[str, Any]
    active_adapters: list[str]

    @property
    def attention(self) -> SharedAttention:
        """The module that holds query projection, keys, targets and replay rows."""
        return self.model.shared_attention  # type: ignore[return-value]

    @property
    def prompt_router(self) -> PromptRouter:
        """What finds the weights of a forward and brings them to the layers."""
        return self.attention.router

    @property
    def pool_name(self) -> str:
        """Name of the active adapter; raises [`TaskError`] if several are active."""
        if len(self.active_adapters) != 1:
            raise TaskError(
                f"{len(self.active_adapters)} adapters are active: choose one pool with set_adapter(name)."
            )
        return self.active_adapters[0]

    @property
    def pool_config(self) -> SaptConfig:
        """Configuration of the active adapter, as it is now."""
        return self.peft_config[self.pool_name]

    @torch.no_grad()
    def attention_weights(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sapt_prompt_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention over the tasks for each prompt: [B, T] in float32, columns in the order of ``model.tasks``.

        Arguments are those of the model's forward; the language model does not run.
        """
        return self.prompt_router.attend(
            self.pooled_prompts(
                [
                    {
                        "input_ids": input_ids,
                        "attention_mask": attention_mask,
                        "inputs_embeds": inputs_embeds,
                        "labels": labels,
                        "sapt_prompt_mask": sapt_prompt_mask,
                    }
                ]
            ),
            self.pool_name,
        )

    @torch.no_grad()
    def pooled_prompts(self, batches: Iterable[Mapping[str, Any]] | Iterable[Tensor] | Tensor) -> Tensor:
        """Pooled prompt embeddings of all rows in ``batches``, [N, d] in float32; pooled tensors pass through.

        Element-wise maxima for the learned attention (SAPT, section 3.2), means for the closed form.

        Raises:
            WeightsError: a pooled tensor has another shape than [N, token_dim].
        """
        if isinstance(batches, Tensor):
            batches = [batches]
        found = []
        for batch in batches:
            if not isinstance(batch, Tensor):
                inputs = {k: v.to(self.attention.weight.device) for k, v in batch.items() if isinstance(v, Tensor)}
                prompts = read_prompts(self.model, self.pool_config, inputs, training=False)
                batch = prompts.pooled
                if prompts.segments is not None:
                    batch = batch[~batch[:, 0].isnan()]  # packed rows may end in padding
            if batch.dim() != 2 or batch.shape[1] != self.pool_config.token_dim:
                raise WeightsError(
                    f"Pooled prompts have shape {list(batch.shape)}, not [N, {self.pool_config.token_dim}]."
                )
            found.append(batch.to(self.attention.weight.device))
        return torch.cat(found) if found else self.attention.weight.new_zeros(0, self.pool_config.token_dim or 0)
