"""L2P: a pool of prompts with keys; each row takes the few whose keys are nearest to its query."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..learner import Bench
from ..method import Found
from .features import Features
from .prefixed import PrefixedModel, PromptMethod

POOL, CHOSEN = 10, 5
PULL = 0.5  # lambda of the paper


class PromptPool(nn.Module):
    """M prompts of L virtual tokens and M keys; ``pull`` is the key loss of the last batch.

    Wang et al. (2022), Eq. 3 to 5: K_x = the N keys of least cosine distance to q(x); the row's prompts are
    concatenated; loss + lambda sum over K_x of (1 - cos(q(x), k)), a mean over the batch.

    Args:
        prompts: [M, L, d].
        keys: [M, k], of the query's width.
        query: gives [B, k] for B prompts of token ids; it does not train.
    """

    def __init__(self, prompts: Tensor, keys: Tensor, query: Features, chosen: int = CHOSEN) -> None:
        super().__init__()
        self.prompts, self.keys = nn.Parameter(prompts), nn.Parameter(keys)
        self._query = [query]
        self.chosen = chosen
        self.pull = prompts.new_zeros(())

    def forward(self, input_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        rows = [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, prompt_mask, strict=True)]
        query = self._query[0](rows).to(self.keys.device)  # [B, k]
        near = torch.nn.functional.cosine_similarity(query[:, None], self.keys[None], dim=-1)  # [B, M]
        values, which = near.topk(self.chosen, dim=1)  # [B, N]
        self.pull = (1 - values).sum(dim=1).mean()
        return self.prompts[which].flatten(1, 2)  # [B, N, L, d] -> [B, N L, d]


class L2P(PromptMethod):
    """One pool of 10 prompts for all tasks, 5 of them before each row, as many virtual tokens as other methods have.

    Source: Wang et al., *Learning to Prompt for Continual Learning*, CVPR 2022. Their query is the class token of a
    frozen vision transformer; here it is the mean of the untouched language model's last hidden states.
    """

    title = "L2P"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        features = Features(bench)
        width = features([bench.style.ids(bench.tokenizer, next(iter(bench.stream.values()))["train"][0])]).shape[1]
        self.length = max(1, bench.budget.virtual_tokens // CHOSEN)
        prompts = self.start(POOL * self.length).view(POOL, self.length, -1)
        pool = PromptPool(prompts, torch.empty(POOL, width).uniform_(-1, 1), features)
        self.model = PrefixedModel(bench.fresh(adapts_input=True), pool)

    def learn(self, name: str) -> None:
        self.train(name, penalty=lambda model: PULL * model.virtual.pull)

    def extra_results(self) -> Found:
        return {"baseline": {"pool": POOL, "chosen": CHOSEN, "length": self.length, "pull_weight": PULL}}
