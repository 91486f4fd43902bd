"""Shared attention: pooled prompt embedding -> query -> softmax over the tasks' keys -> one weight per task."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .closed_form import ClosedForm
from .config import SaptConfig
from .pool import FreePoolModule, Linears, linear_from

LAYER_NORM_EPS = 1e-5


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


def query_of(pooled: Tensor, down: Tensor, up: Tensor, norm: Tensor, bias: Tensor, between: bool) -> Tensor:
    """LayerNorm(SiLU(W_up W_down e)), or with the SiLU ``between`` the two (SAPT, Eq. 1): [..., d] -> [..., d]."""
    x = F.linear(pooled, down)  # [..., query_dim]
    x = F.linear(F.silu(x), up) if between else F.silu(F.linear(x, up))  # [..., d]
    return F.layer_norm(x, norm.shape, norm, bias, LAYER_NORM_EPS)


def key_log_weights(q: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Log of softmax_t(k_t . q / (temperature * sqrt(d))) (SAPT, Eq. 2): q [..., d], keys [T, d] -> [..., T]."""
    scores = q @ keys.T / (temperature * math.sqrt(keys.shape[-1]))
    return F.log_softmax(scores.float(), dim=-1)


class SharedAttention(ClosedForm, FreePoolModule):
    """Query projection and keys of every pool on one base model, with what ARM needs to keep of old tasks.

    Per adapter:
        - ``sapt_query_down`` [query_dim, d], ``sapt_query_up`` [d, query_dim], ``sapt_query_norm``: trainable, carried
          from task to task.
        - ``sapt_key`` [1, d]: key of the newest task. ``sapt_old_keys`` [T - 1, d]: frozen.
        - ``sapt_targets`` [T, T]: row t is the mean attention over task t's own inputs at its commit (zero for tasks
          that came later); a zero row says that task t is not committed.
        - ``sapt_replay`` [N, d]: max-pooled embeddings of the replay rows of all tasks, in the order of
          ``SaptConfig.replay_rows``. The query needs nothing else of a prompt, so no text has to be kept.

    With ``router="ridge"`` there is no query; see [`ClosedForm`].
    """

    adapter_layer_names = ("sapt_query_down", "sapt_query_up", "sapt_query_norm", "sapt_key")
    other_param_names = (
        "sapt_old_keys", "sapt_targets", "sapt_replay", "sapt_gram", "sapt_solved", "sapt_temperatures",
    )  # fmt: skip
    stacks = {"sapt_key": "sapt_old_keys"}
    sapt_query_down: Linears
    sapt_query_up: Linears
    sapt_query_norm: MutableMapping[str, nn.LayerNorm]
    sapt_key: Linears
    sapt_old_keys: Linears
    sapt_targets: Linears
    sapt_replay: Linears

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[str] = set()  # adapters whose weights come from a file

    def update_layer(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Build the parts of ``adapter`` for the tasks in ``config``, in float32."""
        d, tasks = config.token_dim, config.tasks
        if d is None or tasks is None:
            raise ValueError("SaptConfig.token_dim and tasks must be set before the attention is built.")
        self.configs[adapter] = config
        if config.closed_form:
            self.build_sums(adapter, config, device)
        else:
            self.build_query(adapter, config, device)
        # older tasks of a pool built whole count as committed, each to itself until targets are loaded
        committed = torch.arange(len(tasks), device=device) < len(tasks) - 1
        self.sapt_targets[adapter] = linear_from(torch.diag(committed.float()))
        rows = sum(config.replay_rows or [])
        if rows:
            self.sapt_replay[adapter] = linear_from(torch.zeros(rows, d, device=device))

    def build_query(self, adapter: str, config: SaptConfig, device: torch.device | None) -> None:
        """Query projection, and a random key for each task."""
        d, tasks = config.token_dim or 0, config.tasks or []
        self.sapt_query_down[adapter] = nn.Linear(d, config.query_dim, bias=False, device=device)
        self.sapt_query_up[adapter] = nn.Linear(config.query_dim, d, bias=False, device=device)
        self.sapt_query_norm[adapter] = nn.LayerNorm(d, eps=LAYER_NORM_EPS, device=device)
        self.sapt_key[adapter] = linear_from(new_key(d, device))
        if len(tasks) > 1:
            self.sapt_old_keys[adapter] = linear_from(torch.cat([new_key(d, device) for _ in tasks[1:]]))

    def seal(self, adapter: str, sealed: bool) -> None:
        super().seal(adapter, sealed or self.closed_form(adapter))

    def part_sizes(self, config: SaptConfig) -> list[int]:
        return [1] * len(config.tasks or [])

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        """A random key, or for the closed form no sum at all."""
        d = self.configs[adapter].token_dim or 0
        return {"sapt_key": torch.zeros(1, d + 1) if self.closed_form(adapter) else new_key(d, None)}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.loaded.discard(adapter_name)
        self.router.routing.forget(adapter_name)

    def keys(self, adapter: str) -> Tensor:
        """Keys of all tasks, oldest first, [T, d]; only the last row takes a gradient."""
        newest = whole(self.sapt_key[adapter].weight)
        if adapter not in self.sapt_old_keys:
            return newest
        return torch.cat([whole(self.sapt_old_keys[adapter].weight), newest])

    def query(self, pooled: Tensor, adapter: str) -> Tensor:
        """Queries of pooled prompts, see [`query_of`]: [..., d] -> [..., d]."""
        down, up, norm = (
            whole(m[adapter].weight) for m in (self.sapt_query_down, self.sapt_query_up, self.sapt_query_norm)
        )
        bias = whole(self.sapt_query_norm[adapter].bias)
        between = self.configs[adapter].query_activation == "between"
        return query_of(pooled.to(down.dtype), down, up, norm, bias, between)

    def log_weights(self, pooled: Tensor, adapter: str) -> Tensor:
        """Log of softmax_t(k_t . q / (temperature * sqrt(d))) (SAPT, Eq. 2): [..., d] -> [..., T], float32."""
        config = self.configs[adapter]
        if config.closed_form:
            return self.closed_log_weights(adapter, pooled)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            q = self.query(pooled, adapter)  # [..., d]
            keys = self.keys(adapter).to(q.dtype)  # [T, d]
            return key_log_weights(q, keys, config.temperature)

    def targets(self, adapter: str) -> Tensor:
        """Mean attention of each task over its own inputs at its commit, [T, T]; a view unless sharded."""
        return whole(self.sapt_targets[adapter].weight.data)

    def committed(self, adapter: str) -> list[bool]:
        """For each task, oldest first, whether it has been committed."""
        return (self.targets(adapter).sum(dim=1) > 0).tolist()

    def head_is_shut(self, adapter: str) -> bool:
        """Whether the pool's head (modules_to_save) must not train: its task is committed, or several share it."""
        config = self.configs[adapter]
        return bool(config.modules_to_save) and (len(config.tasks or []) > 1 or self.committed(adapter)[-1])

    def replay(self, adapter: str) -> list[Tensor]:
        """Pooled replay embeddings of each task, oldest first, each [n_t, d]; n_t may be 0."""
        counts = self.configs[adapter].replay_rows or []
        if adapter not in self.sapt_replay:
            empty = self.sapt_key[adapter].weight.new_zeros(0, self.configs[adapter].token_dim or 0)
            return [empty for _ in counts]
        return list(whole(self.sapt_replay[adapter].weight.data).split(counts))

    def set_replay(self, adapter: str, rows: list[Tensor]) -> None:
        """Keep ``rows`` ([n_t, d] of each task) in place of what was kept."""
        kept = torch.cat(rows)
        self.configs[adapter].replay_rows = [len(r) for r in rows]
        if len(kept):
            self.sapt_replay[adapter] = linear_from(kept)
        elif adapter in self.sapt_replay:
            del self.sapt_replay[adapter]


def whole(weight: Tensor) -> Tensor:
    """``weight`` itself, or all of it where FSDP2 keeps only a shard here (ARM's loss runs outside any forward)."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def new_key(d: int, device: torch.device | None) -> Tensor:
    """A key as the paper's release starts it: uniform in (-1, 1), [1, d]."""
    return torch.empty(1, d, device=device).uniform_(-1, 1)
