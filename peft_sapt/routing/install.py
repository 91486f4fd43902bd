"""Router, memory, soft prompts and hooks: put onto a base model, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ..config import SaptConfig
from . import ROUTERS
from .forward_state import ForwardState
from .hooks import RoutingHooks
from .memory import MEMORY, TaskMemory, freeze_committed
from .router import Router
from .soft_prompts import SoftPrompts
from .statistics import STATISTICS

try:  # accelerate is PEFT's own dependency; a private move there must not break the import
    from accelerate import init_empty_weights
except ImportError:  # pragma: no cover
    init_empty_weights = None

PROMPTS = "soft_prompts"  # attribute on the base model


def memory_on(model: nn.Module) -> TaskMemory | None:
    """The memory of the pools on ``model``, which has the hooks; None if there is no pool yet."""
    return getattr(model, MEMORY, None)


def install(
    model: nn.Module,
    state: ForwardState,
    adapter: str,
    config: SaptConfig,
    active: list[str],
    embedding: Tensor | None,
    on_meta: bool,
) -> None:
    """Give ``model`` what the pool ``adapter`` needs beside its layers.

    Args:
        active: the adapters that are active now.
        embedding: token embeddings of ``model``, if it has any.
        on_meta: build on the meta device, for weights that are loaded later.
    """
    memory = memory_on(model)
    hooks = add_hooks(model, state) if memory is None else memory.hooks
    router, device = router_for(model, hooks, config.router), None if embedding is None else embedding.device
    with init_empty_weights() if on_meta and init_empty_weights is not None else nullcontext():
        router.update_layer(adapter, config, None if on_meta else device)
        hooks.memory.update_layer(adapter, config, None if on_meta else device)
        hooks.statistics.update_layer(adapter, config, None if on_meta else device)
        if config.block == "prompt":
            prompts_for(model, hooks).update_layer(adapter, config, embedding)
    for module in (*hooks.routers.values(), hooks.memory, hooks.statistics, hooks.prompts):
        if module is not None:
            module.set_adapter(active, inference_mode=bool(config.inference_mode))
    freeze_committed(model)


def add_hooks(model: nn.Module, state: ForwardState) -> RoutingHooks:
    """The memory of tasks, and with it the hooks that route every forward of ``model``."""
    memory = TaskMemory()
    hooks = memory.hooks = RoutingHooks(memory, state)
    hooks.attach(model)
    setattr(model, MEMORY, memory)
    setattr(model, STATISTICS, hooks.statistics)
    hooks.handles.append(model.register_load_state_dict_post_hook(freeze_after_load))
    return hooks


def router_for(model: nn.Module, hooks: RoutingHooks, kind: str) -> Router:
    if kind not in hooks.routers:
        router = hooks.routers[kind] = ROUTERS[kind]()
        router.hooks = hooks
        setattr(model, router.module_name, router)
    return hooks.routers[kind]


def prompts_for(model: nn.Module, hooks: RoutingHooks) -> SoftPrompts:
    if hooks.prompts is None:
        hooks.prompts = SoftPrompts()
        hooks.prompts.hooks = hooks
        setattr(model, PROMPTS, hooks.prompts)
    return hooks.prompts


def freeze_after_load(model: nn.Module, incompatible: Any) -> None:
    """A hook after ``load_state_dict``, which may have brought other targets."""
    freeze_committed(model)


def own_modules() -> list[str]:
    """Attributes of a base model that hold modules of ours."""
    return [*(router.module_name for router in ROUTERS.values()), MEMORY, STATISTICS, PROMPTS]


@contextmanager
def put_aside(model: nn.Module) -> Iterator[None]:
    """``model`` without our modules, so that nothing in modules_to_save, as "norm", is found in them."""
    taken = {name: getattr(model, name) for name in own_modules() if hasattr(model, name)}
    for name in taken:
        delattr(model, name)
    try:
        yield
    finally:
        for name, module in taken.items():
            setattr(model, name, module)


def uninstall(model: nn.Module) -> None:
    """Take hooks and modules of all pools off ``model``."""
    memory = memory_on(model)
    if memory is not None:
        memory.hooks.detach()
    for name in own_modules():
        if hasattr(model, name):
            delattr(model, name)
