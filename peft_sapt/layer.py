"""SaptLayer: a frozen linear layer plus the weighted sum of all blocks of the pool."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import SaptConfig
from .errors import SaptError, WeightsError
from .ops import held_lora, scaled_lora
from .ops.low_rank import low_rank_sum
from .pool_module import Linears, PoolModule, linear_from
from .routing.forward_state import ForwardState
from .routing.mixture import Factors, Mixture


class SaptLayer(PoolModule):
    """Per adapter: ``sapt_A`` [r, in] and ``sapt_B`` [r, out] of the newest task, and the frozen blocks of the older
    ones stacked along the rank axis, ``sapt_old_A`` [R_old, in] and ``sapt_old_B`` [R_old, out].

    B is stored transposed to LoRA's B [out, r]: a block is a run of whole rows in both factors, so that the kernels
    read contiguously, forward and backward are the same products with the factors swapped, and tasks append.
    """

    adapter_layer_names = ("sapt_A", "sapt_B")
    other_param_names = ("sapt_old_A", "sapt_old_B")
    stacks = {"sapt_A": "sapt_old_A", "sapt_B": "sapt_old_B"}
    sapt_A: Linears
    sapt_B: Linears
    sapt_old_A: Linears
    sapt_old_B: Linears

    def __init__(self, base_layer: nn.Module, state: ForwardState) -> None:
        self.base_layer = base_layer
        # nothing is ever merged, so nothing has to be quantised again, which is what the argument is for
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=lambda: None
        )
        for name in self.adapter_layer_names + self.other_param_names:
            setattr(self, name, nn.ModuleDict())
        self.sapt_dropout = nn.ModuleDict()
        self.forward_state = state
        self.configs: dict[str, SaptConfig] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(
                f"Layer of type {type(self.get_base_layer()).__name__} has no known in and out features, so SAPT "
                "cannot adapt it: take it out of target_modules."
            )
        self.in_features, self.out_features = in_features, out_features

    def update_layer(self, adapter: str, config: SaptConfig) -> None:
        """Build a block for each task in ``config``."""
        self.configs[adapter] = config
        blocks = [self.new_block(rank, config.init_weights) for rank in config.task_ranks]
        *old, newest = blocks
        for name in self.adapter_layer_names:
            getattr(self, name)[adapter] = linear_from(newest[name])
            if old:
                getattr(self, self.stacks[name])[adapter] = linear_from(torch.cat([block[name] for block in old]))
        if config.lora_dropout > 0:
            self.sapt_dropout[adapter] = nn.Dropout(config.lora_dropout)
        self._move_adapter_to_device_of_base_layer(adapter)

    def target_device(self) -> torch.device | None:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return device

    def cast_adapter(self, adapter: str) -> None:
        """Give the blocks the dtype of the base layer, if that is a floating one."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is not None and dtype.is_floating_point:
            for name in self.adapter_layer_names + self.other_param_names:
                if adapter in getattr(self, name):
                    getattr(self, name)[adapter].to(dtype)

    def new_block(self, rank: int, identity: bool = True) -> dict[str, Tensor]:
        """A and B as LoRA starts them: A Kaiming-uniform, B zero (or random, for tests)."""
        a = torch.empty(rank, self.in_features)
        b = torch.zeros(rank, self.out_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not identity:
            nn.init.normal_(b, std=1 / math.sqrt(self.in_features))
        return {"sapt_A": a, "sapt_B": b}

    def part_sizes(self, config: SaptConfig) -> list[int]:
        return list(config.task_ranks)

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        return self.new_block(rank, self.configs[adapter].init_weights)

    def has_trained(self, adapter: str) -> bool:
        return self.configs[adapter].init_weights and bool(self.sapt_B[adapter].weight.any())

    def init_from_mixture(self, adapter: str, shares: Tensor) -> None:
        config, (a, b) = self.configs[adapter], (self.sapt_A[adapter].weight, self.sapt_B[adapter].weight)
        *old, own = config.scalings
        ranks = torch.tensor(self.part_sizes(config)[:-1], device=a.device)
        gains = (shares.to(a.device) * torch.tensor(old, device=a.device) / own).repeat_interleave(ranks)  # [R_old]
        old_a, old_b = self.sapt_old_A[adapter].weight, self.sapt_old_B[adapter].weight
        for weight, value in zip((a, b), low_rank_sum(old_a, old_b, gains, len(a)), strict=True):
            weight.data.copy_(value)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        if adapter_name in self.sapt_dropout:
            del self.sapt_dropout[adapter_name]


class Linear(nn.Module, SaptLayer):
    """SAPT on a linear layer: nn.Linear, transformers' Conv1D, or a quantised linear."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SaptConfig,
        state: ForwardState,
        name: str = "a SAPT layer",
        tower: str | None = None,
    ) -> None:
        super().__init__()
        SaptLayer.__init__(self, base_layer, state)
        self.name = name  # in the base model, for messages
        self.tower = tower  # the part of the base model that it is in, if its rows are not the prompts'
        self.is_expert = "expert" in (tower or "")  # whose rows are tokens of any prompt
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # x [B, S, in] -> [B, S, out]
        base = self.base_layer(x, *args, **kwargs)
        if self.forward_state.blocks_are_off:
            return base
        mixture = self.held_mixture()
        session = self.forward_state.session
        if mixture is not None and session is not None:
            known = mixture.stacked(session.stacks, self)
            if known is not None and len(known[2]) == len(x):
                x, scales = self.as_factors(x, known[0]), known[2].to(x.device)
                return held_lora(x, base, known[0], known[1], scales, mixture.config.kernel)
        adapter = next((a for a in self.active_adapters if a in self.sapt_A), None)
        if self.disable_adapters or adapter is None:
            return base
        if self.quantization_backend is not None:
            base = self.quantization_backend.maybe_clone_base_result(base)
        if torch.is_grad_enabled():
            self.check_frozen(adapter)
        scales = self.scales_for(x)  # [B, R]
        config = self.configs[adapter]
        a, b = self.sapt_A[adapter].weight, self.sapt_B[adapter].weight
        old_a = self.sapt_old_A[adapter].weight if adapter in self.sapt_old_A else None
        old_b = self.sapt_old_B[adapter].weight if adapter in self.sapt_old_B else None
        if a.is_meta and not x.is_meta:
            raise WeightsError(
                f"The blocks of {self.name} are on the meta device: their weights are not loaded, or accelerate's "
                "cpu_offload or disk_offload has put them aside, which pools do not support. Keep the model in "
                "memory, or spread it over devices with device_map."
            )
        x = self.as_factors(x, a)
        factors: Factors = (old_a, old_b, a, b, scales)
        if mixture is not None:
            factors = mixture.factors(self, (old_a, old_b, a, b))
        new_x = self.sapt_dropout[adapter](x) if adapter in self.sapt_dropout and self.training else None
        scales = factors[-1] if len(factors[-1]) == len(x) else factors[-1][:1].expand(len(x), -1)
        result = scaled_lora(
            x, base, *factors[:-1], scales.to(x.device),  # of a model spread over devices
            old_gradient=config.old_block_gradient, new_x=new_x, kernel=config.kernel,
        )  # fmt: skip
        return result.to(base.dtype)

    @staticmethod
    def as_factors(x: Tensor, a: Tensor) -> Tensor:
        """``x`` in the dtype of the blocks, as PEFT's LoRA takes it; autocast chooses by itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(a.dtype)

    def held_mixture(self) -> Mixture | None:
        """The mixture of this forward, if it serves many forwards and none of them needs a gradient."""
        mixture = self.forward_state.mixture
        if mixture is None or not mixture.held or self.training or torch.is_grad_enabled():
            return None
        return None if torch.compiler.is_compiling() else mixture  # tracing would start again for every number of rows

    def scales_for(self, x: Tensor) -> Tensor:
        scales = self.forward_state.rank_scales
        if scales is None:
            raise WeightsError(
                f"{self.name} ran outside of the model's own forward, so no attention weights are known. Call the "
                "whole model. (Activation checkpointing other than transformers' own reruns layers alone: use "
                "model.gradient_checkpointing_enable() instead.)"
            )
        agree = self.tower is None or (self.forward_state.rows_agree and not self.is_expert)
        if scales.shape[0] != x.shape[0] or not agree:
            self.refuse_other_rows(scales, x)
        if scales.dim() == 3 and scales.shape[1] != x.shape[1]:
            raise WeightsError(
                f"{self.name} got {x.shape[1]} positions, but attention weights for {scales.shape[1]}: packed rows "
                "are not supported where a module changes the length of a row."
            )
        return scales

    def refuse_other_rows(self, scales: Tensor, x: Tensor) -> None:
        """Raises [`WeightsError`] unless one mixture holds for all rows, of whatever ``x`` has them."""
        if scales.dim() == 2 and bool((scales == scales[:1]).all()):
            return
        cause = "takes tokens of all rows at once, as an expert or a router does, or cuts rows into several"
        if self.tower is not None:
            cause = f"is a part of {self.tower}, whose rows are no prompts but images, sound, positions or tokens"
        raise WeightsError(
            f"{self.name} got {x.shape[0]} rows for {scales.shape[0]} prompts with weights of their own, so those of "
            f"its rows are unknown: it {cause}. Take it out of target_modules (exclude_modules), give one prompt at a "
            "time, or one mixture for all with sapt_task=name or sapt_weights=[T]."
        )

    def __repr__(self) -> str:
        return "sapt." + super().__repr__()


def layer_around(
    target: nn.Module, adapter: str, config: SaptConfig, state: ForwardState, name: str, tower: str | None = None
) -> Linear:
    """The layer in place of ``target``, the base model's module ``name`` in its part ``tower``, see [`tower_of`].

    Raises:
        SaptError: it is no linear layer.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not takes_as_linear(base):
        raise SaptError(
            f"Module {name!r} of type {type(base).__name__} cannot be adapted: SAPT takes nn.Linear, Conv1D and the "
            "quantised linear layers that PEFT knows. Take it out of target_modules."
        )
    return Linear(target, adapter, config, state, name, tower)


def takes_as_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)
    return backend is not None and backend.layer_type == "linear"
