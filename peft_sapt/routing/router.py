"""What a router is: pooled prompts in, log-weights over the tasks out, and what a task's life asks of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..config import SaptConfig
from ..errors import SaptError, TaskError
from ..pool_module import FreePoolModule, unshard


class Router(FreePoolModule):
    """One module per kind of router on a base model; what it holds is keyed by adapter.

    (A module per adapter would break how FSDP gathers modules and how PEFT filters keys.) Containers hold one
    ``nn.Linear`` or LayerNorm per adapter and have names that begin with ``sapt_``: what may train in
    ``adapter_layer_names``, what must not in ``other_param_names``, what belongs to one task in a pair of ``stacks``.
    From these follow freezing, saving, loading, moving and removing.

    A new kind is a subclass in a file beside this one and a line in ``ROUTERS``. It writes the names below,
    ``update_layer``, ``log_weights_of``, and with a pair of stacks ``newest_part``; one that is solved from prompts
    also ``fit`` and ``is_fitted``. Whatever it does: old tasks' parts keep their bytes, and a row's
    weights depend on that row alone.
    """

    kind: ClassVar[str]  # value of SaptConfig.router
    module_name: ClassVar[str]  # attribute on the base model; without "sapt_", which PEFT takes for a layer's part
    needs_replay: ClassVar[bool]  # whether it learns by gradient, so that ARM has to hold the attention of old tasks
    no_decay: ClassVar[tuple[str, ...]] = ()  # trainable containers that an optimizer must not decay
    description: ClassVar[str]  # in a model card: "For every prompt ... decides how much of each block answers it"
    keeps: ClassVar[str] = ""  # in a model card: what it keeps of the prompts, a sentence

    @classmethod
    def check_config(cls, config: SaptConfig) -> None:
        """Raises [`SaptError`] for fields that this kind does not take."""
        if config.pool_padding:
            raise SaptError("SaptConfig.pool_padding reproduces the learned attention: it needs router='attention'.")

    # --- building and saving --------------------------------------------------------------------------------------

    @abstractmethod
    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Build the parts of ``adapter`` for the tasks in ``config``, in float32, and note ``config``."""

    def part_sizes(self, config: SaptConfig) -> list[int]:
        return [1] * len(config.tasks)

    def state_of(self, adapter: str) -> dict[str, Tensor]:
        """Parameters of ``adapter`` by container, and by container.name beside a weight; whole if sharded."""
        found = {}
        for container in self.adapter_layer_names + self.other_param_names:
            modules = getattr(self, container)
            if adapter in modules:
                for name in ("weight", "bias"):  # by name: FSDP's flat parameters leave plain tensors in their place
                    tensor = getattr(modules[adapter], name, None)
                    if isinstance(tensor, Tensor):
                        found[state_key(container, name)] = unshard(tensor)
        return found

    # --- routing --------------------------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def log_weights_of(state: Mapping[str, Tensor], config: SaptConfig, pooled: Tensor) -> Tensor:
        """Log of the weights over the tasks, oldest first, from a state alone: [..., d] -> [..., T], float32.

        Args:
            state: as [`state_of`] gives it, or the same tensors out of a file.
            pooled: features of prompts, see [`features`].
        """

    def log_weights(self, adapter: str, pooled: Tensor) -> Tensor:
        """[`log_weights_of`] with the state of ``adapter``: [..., d] -> [..., T], float32."""
        return self.log_weights_of(self.state_of(adapter), self.configs[adapter], pooled)

    def attend(self, adapter: str, pooled: Tensor, training: bool = False) -> Tensor:
        """Pooled prompts [B, d] -> weights [B, T]; uniform for a row without any prompt token, zero for a stranger.

        A stranger is answered by the base model alone. Rows in ``training`` are none.
        """
        empty = pooled.isnan().any(dim=1, keepdim=True)
        filled = pooled.masked_fill(empty, 0.0)
        weights = self.log_weights(adapter, filled).exp()
        strangers = None if training else self.hooks.statistics.strangers(adapter, filled)
        if strangers is not None:
            weights = weights.masked_fill(strangers.unsqueeze(1), 0.0)
        return torch.where(empty, torch.full_like(weights, 1 / weights.shape[1]), weights)

    @classmethod
    def stored_weights(
        cls, state: Mapping[str, Tensor], config: SaptConfig, replay: list[Tensor]
    ) -> list[Tensor | None]:
        """Mean weights [T] of what is stored of each task, for the model card; None where nothing is.

        Args:
            replay: what stands for each task's pooled prompts, [n_t, d]; n_t may be 0.
        """
        return [cls.log_weights_of(state, config, r).exp().mean(dim=0) if len(r) else None for r in replay]

    # --- a task's life --------------------------------------------------------------------------------------------

    def check_ready(self, adapter: str) -> None:
        """Raises [`TaskError`] if the newest task cannot train yet; called in every training forward."""

    def fit(self, adapter: str, pooled: Tensor) -> None:
        """Take in the newest task's training prompts [n, d], before it trains; [`check_fit`] has let them through."""

    def check_fit(self, adapter: str) -> None:
        """Raises [`TaskError`] if [`fit`] must not see the newest task's prompts, or has seen them."""
        if self.needs_replay:
            raise TaskError(
                "fit_router is for routers that are solved from prompts, as router='ridge'; "
                f"{self.kind!r} is fitted in training."
            )

    def is_fitted(self, adapter: str) -> bool:
        """Whether [`fit`] has seen the newest task; a router that needs neither fit nor replay is always fitted."""
        return False

    def reopen(self, adapter: str) -> None:
        """The newest task is no longer committed, and more prompts of it may come."""

    def resize(self, adapter: str, kept: list[int]) -> None:
        """Let what is in no stack follow its tasks: ``kept`` are indices of before, -1 for a new task."""

    def on_background(self, adapter: str) -> None:
        """The pool knows other prompts that belong to no task than before."""

    def on_commit(self, adapter: str, pooled: Tensor) -> None:
        """The newest task is about to be committed, with these training prompts [n, d], n > 0."""


def state_key(container: str, parameter: str) -> str:
    """The name of a parameter in a router's state: that of its container, if it is a weight."""
    return container if parameter == "weight" else f"{container}.{parameter}"


def feature_dim_of(config: SaptConfig) -> int:
    """Width of pooled prompts, which is known once the pool stands on a base model."""
    if config.feature_dim is None:
        raise ValueError("SaptConfig.feature_dim must be set before a router is built.")
    return config.feature_dim


def stacked(state: Mapping[str, Tensor], newest: str, old: str) -> Tensor:
    """A stack of a state with its newest part last, [T, ...]."""
    return torch.cat([state[old], state[newest]]) if old in state else state[newest]
