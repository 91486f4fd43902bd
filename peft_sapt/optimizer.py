"""Optimizer groups of a pool: blocks, query projection, keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import TrainingError
from .routing import ROUTERS
from .routing.memory import TaskMemory

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_groups(
    model: torch.nn.Module,
    lr: float,
    attention_lr: float | None = None,
    weight_decay: float = 0.0,
    b_lr_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups of what trains now: blocks, the router's attention, and its keys, which are not decayed.

    Args:
        lr: learning rate of the blocks and of everything outside the attention.
        attention_lr: learning rate of query projection and key; ``lr`` by default.
        weight_decay: of blocks and projection; keys and the query's LayerNorm get none, since decay would shorten
            keys and so shift attention for no reason in the data.
        b_lr_ratio: factors B learn at ``b_lr_ratio * lr`` (LoRA+, arXiv 2402.12354, which proposes 16). PEFT's own
            helper for LoRA+ looks for ``lora_B`` by name, and does not find them.

    Raises:
        TrainingError: nothing trains: the newest task is committed, or the pool was loaded for inference.
    """
    found: dict[str, list[torch.nn.Parameter]] = {"blocks": [], "blocks_b": [], "attention": [], "keys": []}
    routing = {name for router in ROUTERS.values() for name in router.adapter_layer_names}
    undecayed = {name for router in ROUTERS.values() for name in router.no_decay}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        containers = set(name.split("."))
        if containers & undecayed:
            found["keys"].append(parameter)
        elif containers & routing:
            found["attention"].append(parameter)
        elif "sapt_B" in containers and b_lr_ratio != 1.0:
            found["blocks_b"].append(parameter)
        else:
            found["blocks"].append(parameter)
    if not any(found.values()):
        memory = next((m for m in model.modules() if isinstance(m, TaskMemory)), None)
        adapter = None if memory is None else memory.hooks.active()
        if memory is not None and adapter is not None:
            memory.refuse_untrainable(adapter)
        raise TrainingError("No parameter has requires_grad=True.")
    rate = lr if attention_lr is None else attention_lr
    settings = {
        "blocks": (lr, weight_decay),
        "blocks_b": (lr * b_lr_ratio, weight_decay),
        "attention": (rate, weight_decay),
        "keys": (rate, 0.0),
    }
    return [
        {"params": found[name], "lr": settings[name][0], "weight_decay": settings[name][1], "name": name}
        for name in found
        if found[name]
    ]


def create_optimizer(
    model: torch.nn.Module, args: TrainingArguments, attention_lr: float | None = None, b_lr_ratio: float = 1.0
) -> tuple[torch.optim.Optimizer, None]:
    """The optimizer that ``args`` asks for, over [`optimizer_groups`]; pass it on as ``Trainer(optimizers=...)``.

    The scheduler is left to the Trainer, which scales all groups alike. Build it after ``add_task``.

    ```py
    >>> Trainer(model=model, args=args, optimizers=create_optimizer(model, args, attention_lr=3e-4), ...)
    ```
    """
    from transformers import Trainer  # here, as it loads datasets

    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]  # the model is asked for its names alone
    groups = optimizer_groups(model, args.learning_rate, attention_lr, args.weight_decay, b_lr_ratio)
    kwargs = {k: v for k, v in kwargs.items() if k != "lr"}
    return cls(groups, lr=args.learning_rate, **kwargs), None
