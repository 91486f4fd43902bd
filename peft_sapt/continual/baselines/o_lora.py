"""O-LoRA: a LoRA for each task, whose subspace is kept orthogonal to those of the older ones; all are added up."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..learner import Bench, train
from ..method import Found, Method, lora_config

WEIGHT = 0.5  # lambda_1 of the authors' scripts; their lambda_2, of an L2 term, is 0


def orthogonality(model: nn.Module, old: list[str], new: str) -> Tensor:
    """Sum over layers and old adapters i of the absolute entries of A_new A_i^T.

    Wang et al. (2023, arXiv:2310.14152), section 3.2: rows of A span a task's subspace, O = A_i A_new^T [r, r] is zero
    where two are orthogonal. The paper writes the sum of squares of O, its code takes absolute values, as here.
    """
    terms = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            shrink = {name: cast(Tensor, layer.lora_A[name].weight) for name in [new, *old]}  # [r, d]
            terms += [(shrink[new] @ shrink[name].T).abs().sum() for name in old]  # [r, d] · [d, r] -> [r, r]
    return torch.stack(terms).sum()


class OLora(Method):
    """Old adapters are frozen, the sum of all answers, and the new one trains under the orthogonality penalty.

    Source: Wang et al., *Orthogonal Subspace Learning for Language Model Continual Learning*, EMNLP Findings 2023.
    """

    title = "O-LoRA"

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.adapters: list[str] = []

    def learn(self, name: str) -> None:
        old, new = list(self.adapters), f"task_{len(self.adapters)}"
        if self.model is None:
            self.model = get_peft_model(self.bench.fresh(), lora_config(self.bench), adapter_name=new)
        else:
            self.model.add_adapter(new, lora_config(self.bench))
        self.adapters.append(new)
        self.model.base_model.set_adapter(self.adapters)
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{new}." in key)
        penalty = (lambda model: WEIGHT * orthogonality(model, old, new)) if old else None
        train(self.bench, self.model, name, [], penalty=penalty)

    def extra_results(self) -> Found:
        return {"baseline": {"orthogonality_weight": WEIGHT}}

    def save(self, folder: Any) -> None:
        self.model.save_pretrained(folder, selected_adapters=self.adapters)
