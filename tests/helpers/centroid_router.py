"""A third router, as somebody else would write one: the nearest class centroid. `helpers` registers it by one line."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_sapt.errors import TaskError
from peft_sapt.pool_module import linear_from
from peft_sapt.routing import Router
from peft_sapt.routing.router import stacked


class CentroidRouter(Router):
    """``softmax(cos(x, c_t) / 0.1)`` with ``c_t`` [1, d] the mean of task t's mean-pooled prompts."""

    kind, module_name = "centroid", "centroid_router"
    needs_replay = False
    description = "the nearest class centroid"
    keeps = "Of the prompts the pool keeps one centroid per task."
    other_param_names = ("sapt_centroid", "sapt_old_centroids")
    stacks = {"sapt_centroid": "sapt_old_centroids"}

    def update_layer(self, adapter, config, device):
        self.configs[adapter] = config
        make = torch.zeros if config.init_weights else torch.randn
        *old, newest = make(len(config.tasks), config.feature_dim, device=device).split(1)
        self.sapt_centroid[adapter] = linear_from(newest)
        if old:
            self.sapt_old_centroids[adapter] = linear_from(torch.cat(old))

    def newest_part(self, adapter, rank):
        return {"sapt_centroid": torch.zeros(1, self.configs[adapter].feature_dim)}

    @staticmethod
    def log_weights_of(state, config, pooled):
        centroids = stacked(state, "sapt_centroid", "sapt_old_centroids")  # [T, d]
        near = F.cosine_similarity(pooled.float().unsqueeze(-2), centroids, dim=-1) / 0.1  # [..., T]
        return F.log_softmax(near.masked_fill(~centroids.any(dim=-1) & centroids.any(), -torch.inf), dim=-1)

    @classmethod
    def stored_weights(cls, state, config, replay):
        centroids = stacked(state, "sapt_centroid", "sapt_old_centroids")
        return [cls.log_weights_of(state, config, c).exp() if c.any() else None for c in centroids]

    def is_fitted(self, adapter):
        return bool(self.sapt_centroid[adapter].weight.any())

    def check_ready(self, adapter):
        if not self.is_fitted(adapter):
            raise TaskError("The router has not seen prompts of the task: call model.fit_router(batches).")

    def fit(self, adapter, pooled):
        self.sapt_centroid[adapter].weight.data.copy_(pooled.mean(dim=0, keepdim=True))

    def on_commit(self, adapter, pooled):
        if not self.is_fitted(adapter):
            self.fit(adapter, pooled)
