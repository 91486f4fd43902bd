"""The storage rule of a pool: per adapter one trainable newest part, one frozen stack of older parts.

Freezing is structural. What may train sits in containers that PEFT knows as trainable (``adapter_layer_names``); what
must never change again sits in containers that PEFT deletes and moves but never un-freezes (``other_param_names``).
A committed task stays in the first kind until the next one is added; it is frozen there through PEFT's own
``frozen_peft_weight_names``, which PEFT reapplies wherever it would switch gradients on.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import SaptConfig
from .errors import TrainingError

Linears = MutableMapping[str, nn.Linear]  # what an nn.ModuleDict of them is to a reader


def freeze_heads(model: nn.Module, adapter: str, frozen: bool, trains: bool) -> None:
    """Freeze the heads (modules_to_save) that belong to ``adapter``, or open them if it ``trains`` now.

    PEFT un-freezes them with every switch, so this is called again before each training forward.
    """
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            for name, parameter in module.named_parameters():
                if f".{adapter}." in f".{name}." and (frozen or trains):
                    parameter.requires_grad_(not frozen)


def sharding_of(model: nn.Module) -> str | None:
    """ "FSDP1" or "FSDP2" if parameters of ``model`` are sharded, else None."""
    kinds = {type(p).__name__ for p in model.parameters()}
    if "DTensor" in kinds:
        return "FSDP2"
    return "FSDP1" if "FlatParameter" in kinds else None


def unshard(weight: Tensor) -> Tensor:
    """``weight`` itself, or all of it where FSDP2 keeps only a shard here (ARM's loss runs outside any forward)."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module with the token embeddings of ``model``; None if it has none, or does not tell."""
    try:
        table: nn.Module | None = model.get_input_embeddings()  # type: ignore[operator]  # caught if there is none
    except (AttributeError, NotImplementedError):
        return None
    return table


def linear_from(weight: Tensor, trainable: bool = False) -> nn.Linear:
    """An nn.Linear without bias around ``weight`` [out, in]; sharding libraries gather modules, not bare tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=trainable)
    return layer


SUCCESSOR = "_sapt_successor"  # on a parameter that was replaced: the one in its place
_changes = [0]


def replace_part(containers: Linears, adapter: str, weight: Tensor) -> None:
    """Put ``weight`` in the place of a part; what was there, and an optimizer may hold, then knows its successor."""
    before = containers[adapter].weight
    containers[adapter] = linear_from(weight)
    setattr(before, SUCCESSOR, containers[adapter].weight)
    _changes[0] += 1


def changes_of_parts() -> int:
    """How often in this process a part was replaced, or another one was made to train."""
    return _changes[0]


def latest_of(parameter: Tensor) -> Tensor:
    """The parameter that is now in the place of ``parameter``; itself if it was never replaced."""
    while (successor := getattr(parameter, SUCCESSOR, None)) is not None:
        parameter = successor
    return parameter


UNFROZEN = (
    "{part} of {where} has requires_grad=True, but holds what committed tasks have learned, which never changes. "
    "Leave requires_grad as the pool sets it: model.base_model.set_adapter(name) does so again."
)


class PoolModule(BaseTunerLayer):
    """Mixin of every module that holds parts of a pool: target layers, routers, soft prompts, the memory of tasks.

    ``stacks`` maps the container of the newest part to that of the older ones, which are stacked on their rows.
    """

    stacks: dict[str, str] = {}
    configs: dict[str, SaptConfig]

    def part_sizes(self, config: SaptConfig) -> list[int]:
        """Rows that each task of ``config`` has in a stack, oldest first."""
        raise NotImplementedError

    def newest_part(self, adapter: str, rank: int) -> dict[str, Tensor]:
        """What a new task starts with, by container; ``rank`` is that of its LoRA block."""
        raise NotImplementedError

    def has_trained(self, adapter: str) -> bool:
        """Whether the newest part can be seen to be no longer what a new task starts with."""
        return False

    def init_from_mixture(self, adapter: str, shares: Tensor) -> None:
        """Start the newest block at the mixture of the older ones with ``shares`` [T - 1]."""

    def target_device(self) -> torch.device | None:
        """The device that the parts belong on; None if that is not known."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the adapter, but never cast it: PEFT's own version would round frozen parts to the base's dtype."""
        device = self.target_device() if device is None else device
        for name in self.adapter_layer_names + self.other_param_names:
            containers = getattr(self, name)
            if device is None or adapter_name not in containers:
                continue
            if not any(p.device.type == "meta" for p in containers[adapter_name].parameters()):
                containers[adapter_name].to(device)

    def holds(self, adapter: str) -> bool:
        """Whether this module has parts of ``adapter``."""
        return adapter in self.configs

    def freeze_newest(self, adapter: str, frozen: bool) -> None:
        """Freeze the newest part until it is opened again, whatever PEFT call comes in between."""
        was_frozen = adapter in self.frozen_peft_weight_names
        names = {k: v for k, v in self.frozen_peft_weight_names.items() if k != adapter}
        if frozen:
            names[adapter] = self.adapter_layer_names
        self.frozen_peft_weight_names = names
        if was_frozen and not frozen and adapter in self.active_adapters:
            self.set_adapter(self.active_adapters, inference_mode=bool(self.configs[adapter].inference_mode))
        self._freeze_non_trainable_peft_weights()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; parts that never train are frozen again, whoever opened them."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name in self.other_param_names:
            getattr(self, name).requires_grad_(False)
        _changes[0] += 1  # optimizers are looked at again: what trains is another part now

    def check_frozen(self, adapter: str) -> None:
        """Raises [`TrainingError`] if a part that must keep its bytes would train, as after a user's own
        ``requires_grad_(True)``."""
        names = self.other_param_names
        if adapter in self.frozen_peft_weight_names:
            names = names + self.adapter_layer_names
        for name in names:
            containers = getattr(self, name)
            if adapter in containers and any(p.requires_grad for p in containers[adapter].parameters()):
                where = getattr(self, "name", "the base model")
                raise TrainingError(UNFROZEN.format(part=f"{name}.{adapter}", where=where))

    def append_task(self, adapter: str, newest: dict[str, Tensor]) -> None:
        """Move the newest part onto the frozen stack and put ``newest`` in its place, frozen."""
        for name, old_name in self.stacks.items():
            current, stack = getattr(self, name), getattr(self, old_name)
            parts = [stack[adapter].weight.data] if adapter in stack else []
            parts.append(current[adapter].weight.data)
            stack[adapter] = linear_from(torch.cat(parts))
            replace_part(current, adapter, newest[name])

    def drop_part(self, adapter: str, index: int, sizes: list[int]) -> None:
        """Take part ``index`` out of the pool; ``sizes`` are the extents of all parts, oldest first.

        Without its newest part, the pool's next older one becomes the newest.
        """
        for name, old_name in self.stacks.items():
            parts = self.parts(name, adapter, sizes)
            del parts[index]
            current, stack = getattr(self, name), getattr(self, old_name)
            replace_part(current, adapter, parts.pop().clone())
            if parts:
                stack[adapter] = linear_from(torch.cat(parts))
            else:
                del stack[adapter]

    def parts(self, name: str, adapter: str, sizes: list[int]) -> list[Tensor]:
        """The parts in container ``name``, oldest first, as views of the stored weights."""
        stack = getattr(self, self.stacks[name])
        old = list(stack[adapter].weight.data.split(sizes[:-1])) if adapter in stack else []
        return [*old, getattr(self, name)[adapter].weight.data]

    def put_parts(self, name: str, adapter: str, parts: list[Tensor]) -> None:
        """Write ``parts``, oldest first, into container ``name`` and its stack."""
        current, stack = getattr(self, name), getattr(self, self.stacks[name])
        weight = current[adapter].weight
        weight.data.copy_(parts[-1])
        if len(parts) > 1:
            stack[adapter] = linear_from(torch.cat(parts[:-1]).to(weight.device))


class FreePoolModule(nn.Module, PoolModule):
    """A part of pools that stands in no layer's place but on the base model itself."""

    def __init__(self) -> None:
        super().__init__()
        for name in self.adapter_layer_names + self.other_param_names:
            setattr(self, name, nn.ModuleDict())
        self.configs: dict[str, SaptConfig] = {}
        self.hooks: Any = None  # the RoutingHooks on the base model
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = []

    @property
    def weight(self) -> Tensor:
        """PEFT asks a tuner layer for its base layer's weight; there is none, some part stands in."""
        return next(self.parameters(), torch.empty(0))

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.weight.device

    @property
    def in_features(self) -> int:
        """Width of a pooled prompt, which PEFT's tools ask every tuner layer for."""
        return max((config.feature_dim or 0 for config in self.configs.values()), default=0)

    @property
    def out_features(self) -> int:
        """Tasks of the largest pool."""
        return max((len(config.tasks) for config in self.configs.values()), default=0)

    @property
    def bias(self) -> None:  # type: ignore[override]  # no layer, so no bias
        return None

    def target_device(self) -> torch.device | None:
        """The device of the base model's embeddings, or of its first parameter; None while there is no base."""
        base = None if self.hooks is None else self.hooks.base
        if base is None:
            return None
        table = input_embeddings(base)
        found: Tensor | None = next(iter((base if table is None else table).parameters()), None)
        return None if found is None or found.device.type == "meta" else found.device

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
