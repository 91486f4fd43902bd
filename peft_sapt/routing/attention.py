"""The learned router: pooled prompt embedding -> query -> softmax over the tasks' keys -> one weight per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SaptConfig
from ..errors import SaptError
from ..pool_module import Linears, linear_from
from .router import Router, feature_dim_of, stacked

LAYER_NORM_EPS = 1e-5


def query_of(pooled: Tensor, down: Tensor, up: Tensor, norm: Tensor, bias: Tensor, between: bool) -> Tensor:
    """LayerNorm(SiLU(W_up W_down e)), or with the SiLU ``between`` the two (SAPT, Eq. 1): [..., d] -> [..., d]."""
    x = F.linear(pooled, down)  # [..., query_dim]
    x = F.linear(F.silu(x), up) if between else F.silu(F.linear(x, up))  # [..., d]
    return F.layer_norm(x, norm.shape, norm, bias, LAYER_NORM_EPS)


def key_log_weights(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Log of softmax_t(k_t . q / (temperature * sqrt(d))) (SAPT, Eq. 2): q [..., d], keys [T, d] -> [..., T]."""
    scores = q @ keys.T / (temperature * math.sqrt(keys.shape[-1]))
    return F.log_softmax(scores.float(), dim=-1)


def new_key(d: int, device: torch.device | None) -> Tensor:
    """A key as the official release starts it: uniform in (-1, 1), [1, d]."""
    return torch.empty(1, d, device=device).uniform_(-1, 1)


class AttentionRouter(Router):
    """The shared attention of SAPT: a query from the prompt attends to one key per task.

    Per adapter:
        - ``sapt_query_down`` [query_dim, d], ``sapt_query_up`` [d, query_dim], ``sapt_query_norm``: trainable, carried
          from task to task.
        - ``sapt_key`` [1, d]: key of the newest task. ``sapt_old_keys`` [T - 1, d]: frozen.
    """

    kind = "attention"
    module_name = "shared_attention"
    needs_replay = True
    description = "a learned attention (a query from the prompt, one key per task)"

    adapter_layer_names = ("sapt_query_down", "sapt_query_up", "sapt_query_norm", "sapt_key")
    other_param_names = ("sapt_old_keys",)
    no_decay = ("sapt_key", "sapt_query_norm")  # decay would shorten keys, and so shift attention
    stacks = {"sapt_key": "sapt_old_keys"}
    sapt_query_down: Linears
    sapt_query_up: Linears
    sapt_query_norm: MutableMapping[str, nn.LayerNorm]
    sapt_key: Linears
    sapt_old_keys: Linears

    @classmethod
    def check_config(cls, config: SaptConfig) -> None:
        if config.pool_padding and config.features not in (None, "max"):
            raise SaptError("SaptConfig.pool_padding reproduces the official code: it needs features='max'.")

    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Query projection, and a random key for each task."""
        d = feature_dim_of(config)
        self.configs[adapter] = config
        self.sapt_query_down[adapter] = nn.Linear(d, config.query_dim, bias=False, device=device)
        self.sapt_query_up[adapter] = nn.Linear(config.query_dim, d, bias=False, device=device)
        self.sapt_query_norm[adapter] = nn.LayerNorm(d, eps=LAYER_NORM_EPS, device=device)
        self.sapt_key[adapter] = linear_from(new_key(d, device))
        if len(config.tasks) > 1:
            self.sapt_old_keys[adapter] = linear_from(torch.cat([new_key(d, device) for _ in config.tasks[1:]]))

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        return {"sapt_key": new_key(feature_dim_of(self.configs[adapter]), None)}

    @staticmethod
    def log_weights_of(state: Mapping[str, Tensor], config: SaptConfig, pooled: Tensor) -> Tensor:
        """Log of softmax_t(k_t . q / (temperature * sqrt(d))) (SAPT, Eq. 2): [..., d] -> [..., T], float32."""
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            q = query_in(state, config, pooled)  # [..., d]
            keys = stacked(state, "sapt_key", "sapt_old_keys").to(q.dtype)  # [T, d]
            return key_log_weights(q, keys, config.temperature)

    def query(self, pooled: Tensor, adapter: str) -> Tensor:
        """Queries of pooled prompts, see [`query_of`]: [..., d] -> [..., d]."""
        return query_in(self.state_of(adapter), self.configs[adapter], pooled)

    @torch.no_grad()
    def on_commit(self, adapter: str, pooled: Tensor) -> None:
        """A first task's key, which gets no gradient (a softmax of one), becomes the mean query of its prompts."""
        if len(self.configs[adapter].tasks) == 1:
            self.sapt_key[adapter].weight.copy_(self.query(pooled, adapter).mean(dim=0, keepdim=True))


def query_in(state: Mapping[str, Tensor], config: SaptConfig, pooled: Tensor) -> Tensor:
    """Queries of pooled prompts by a router's state: [..., d] -> [..., d]."""
    down, up, norm = (state[name] for name in ("sapt_query_down", "sapt_query_up", "sapt_query_norm"))
    bias, between = state["sapt_query_norm.bias"], config.query_activation == "between"
    return query_of(pooled.to(down.dtype), down, up, norm, bias, between)
