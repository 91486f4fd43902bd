"""What ArmCallback needs to know of a Trainer's model, arguments and data before it starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ReflectionError, TaskError, TrainingError
from ..pool.view import Pool
from ..pool_module import sharding_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

FAST_ATTENTION = 2e-3  # learning rate of a learned router from which old tasks lose their attention


def pool_of(model: Any) -> Pool:
    """The active pool of what a Trainer holds; raises [`ReflectionError`] if there is none."""
    found = getattr(model, "module", model)
    pool = getattr(found, "pool", None)
    if not isinstance(pool, Pool):
        pool = getattr(getattr(found, "base_model", None), "pool", None)
    if not isinstance(pool, Pool):
        raise ReflectionError(
            f"ArmCallback works on a PeftModel with a SaptConfig, got {type(model).__name__}: build it with "
            "get_peft_model(model, SaptConfig(...))."
        )
    return pool


def can_generate(pool: Pool) -> bool:
    asked = getattr(pool.base, "can_generate", None)
    return bool(asked()) if callable(asked) else False


def check_arguments(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ReflectionError("nn.DataParallel is not supported: start the script with torchrun or accelerate launch.")


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_optimizer(model: Any, pool: Pool, optimizer: Any) -> None:
    """Refuse an optimizer that does not hold what is about to train, as one that was built before ``add_task``.

    Not looked at are optimizers that hold other tensors in place of the model's own (FSDP, ZeRO).

    Raises:
        TrainingError: it names the parameters that would not move.
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer) or sharding_of(pool.base) is not None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TrainingError(
            f"The optimizer does not hold {shown}, so task {pool.current_task!r} would not be trained: it was built "
            "before add_task, which replaces parameters, or leaves some out. Build a Trainer, and optimizers if you "
            "give it some, for each task; parameters that are not to train need requires_grad=False."
        )


def check_task_of_rows(dataset: Any, pool: Pool) -> None:
    """Refuse rows that say, in a column ``task``, that they belong to another task than the current one."""
    columns = getattr(dataset, "column_names", None) or []
    names = set(dataset["task"]) if "task" in columns else set()
    other = sorted(name for name in names if name in pool.tasks and name != pool.current_task)
    if other:
        raise TaskError(
            f"The training rows belong to task {other}, but only the current task {pool.current_task!r} of the pool "
            "can be trained: blocks of older tasks are frozen for good."
        )


class isolated_rng:
    """Seeds torch inside, and leaves the generators of torch as they were outside: resumed runs stay bit-identical.

    Those of the CPU, and of the GPU that ``model`` is on; without a model, of the CPU alone.
    """

    def __init__(self, seed: int, model: Any) -> None:
        device = None if model is None else next(model.parameters()).device
        self.seed, self.device = seed, device if device is not None and device.type == "cuda" else None
        self.fork = torch.random.fork_rng(devices=[] if self.device is None else [self.device])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed every GPU, listed or not
        if self.device is not None:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def warn_of_fast_attention(pool: Pool, optimizer: Any) -> None:
    """Say so if the router is about to learn at a rate that loosens what old tasks have.

    At the blocks' own 5e-3 the second task of a stream fell from 0.96 of its prompts' attention to 0.46 by its end.
    """
    if optimizer is None or len(pool.tasks) == 1 or not pool.router.needs_replay or sharding_of(pool.base) is not None:
        return
    attention = {id(p) for p in pool.router.parameters() if p.requires_grad}
    rates = [
        g.get("initial_lr", g["lr"]) for g in optimizer.param_groups if any(id(p) in attention for p in g["params"])
    ]
    fastest = max(rates, default=0.0)
    if fastest > FAST_ATTENTION:
        warnings.warn(
            f"The attention is about to learn at {fastest:g}, which loosens that of old tasks: give the Trainer "
            "optimizers=peft_sapt.create_optimizer(model, args, attention_lr=3e-4).",
            stacklevel=3,
        )
