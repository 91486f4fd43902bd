"""What the op is compared with: the loop of the official release, and PEFT's LoRA, X-LoRA and Arrow layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn


def naive_sum(
    x: Tensor, base: Tensor, old: Sequence[tuple[Tensor, Tensor]], new: tuple[Tensor, Tensor], weights: Tensor
) -> Tensor:
    """The sum at the cost of the official release: each block runs alone, and all outputs are stacked.

    Args:
        x: [B, S, D]; the frozen blocks see it without its graph, as there. base: [B, S, O].
        old, new: pairs of A [r, D] and B transposed, [r, O]. weights: [B, T], scaling included.
    """
    frozen = x.detach()
    outputs = [frozen @ a.mT @ b for a, b in old] + [x @ new[0].mT @ new[1]]  # each [B, S, O]
    return base + (torch.stack(outputs) * weights.T[:, :, None, None]).sum(dim=0)


class Given(nn.Linear):
    """A frozen layer whose output is known beforehand, so that only what is added to it takes time."""

    def __init__(self, output: Tensor, width: int) -> None:
        super().__init__(width, output.shape[-1], bias=False, device="meta")
        self.weight = nn.Parameter(torch.empty(output.shape[-1], width, device=output.device, dtype=output.dtype))
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def peft_layer(base: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], config: LoraConfig | None = None) -> Linear:
    """PEFT's LoRA layer with one adapter per block, scaling 1; the last one trains."""
    rank, width = blocks[0][0].shape
    config = config or LoraConfig(r=rank, lora_alpha=rank)
    names = [f"task_{i}" for i in range(len(blocks))]
    layer = Linear(Given(base, width), names[0], config, r=rank, lora_alpha=rank)
    for name in names[1:]:
        layer.update_layer(name, rank, rank, LoraConfig(r=rank, lora_alpha=rank))
    layer.set_adapter(names)
    for name, (a, b) in zip(names, blocks, strict=True):
        for part, value in ((layer.lora_A[name], a), (layer.lora_B[name], b.mT)):
            part.weight = nn.Parameter(value.detach().clone(), requires_grad=name == names[-1])
    return layer


def xlora(layer: Linear, weights: Tensor, length: int) -> Callable[[Tensor], Tensor]:
    """X-LoRA's layer over the adapters of ``layer``, with given weights [B, T] for every token."""
    config = XLoraConfig(hidden_size=1, adapters={})
    loop = XLoraLinearLayer(SimpleNamespace(disabled=False), layer, layer.forward, 0, config)  # type: ignore[arg-type]
    base = layer.get_base_layer()

    def run(x: Tensor) -> Tensor:
        scalings = weights[:, None, None].expand(-1, length, 1, -1)  # [B, S, layers, T]
        given, base.output = base.output, base.output.clone()  # it is added to in place
        try:
            return loop.forward(x, scalings=scalings)
        finally:
            base.output = given

    return run


def arrow(base: Tensor, blocks: Sequence[tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """Arrow's layer over the same blocks; its weights are its own, from prototypes, one vector per token."""
    layer = peft_layer(base, blocks)
    routing = ArrowConfig(top_k=len(blocks))
    routing.task_adapter_names, routing.gks_adapter_names = list(layer.lora_A), []
    rank = blocks[0][0].shape[0]
    layer.update_layer("arrow_router", rank, rank, LoraConfig(r=rank, lora_alpha=rank, arrow_config=routing))
    layer.set_adapter("arrow_router")
    return layer.forward
