"""Stops training before a NaN or infinity reaches the weights, and names the batch it came with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import TrainingError

ROWS, TOKENS = 4, 12  # of a batch, shown in the message
MICRO_BATCHES = 256  # micro-batches between two steps that are looked at


class Guard:
    """Keeps loss and tokens of the micro-batches since the last optimizer step, and judges them once per step.

    Nothing is read from the device before [`check`], so that no forward waits for it.
    """

    def __init__(self) -> None:
        self.seen: deque[tuple[Tensor | None, Tensor | None]] = deque(maxlen=MICRO_BATCHES)
        self.handle: Any = None

    def attach(self, model: nn.Module) -> None:
        """Watch the forwards of ``model`` until [`detach`]."""
        self.detach()
        self.handle = model.register_forward_hook(self.note, with_kwargs=True)

    def detach(self) -> None:
        """Watch no more."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = None
        self.seen.clear()

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook; it changes nothing."""
        if module.training and torch.is_grad_enabled():
            loss = output.get("loss") if isinstance(output, Mapping) else None
            self.seen.append((loss.detach() if isinstance(loss, Tensor) else None, kwargs.get("input_ids")))

    def check(self, model: nn.Module, task: str, step: int, tokenizer: Any, scaled: bool) -> None:
        """Judge what an optimizer step is about to take; of several processes all raise if one has to.

        Args:
            step: the number of the step, from 1. scaled: a GradScaler skips steps with infinite gradients by itself.

        Raises:
            TrainingError: a loss, a gradient, or a weight is NaN or infinite.
        """
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.grad is not None]
        seen = list(self.seen)
        self.seen.clear()
        losses = [loss for loss, _ in seen if loss is not None]
        found = finite([*losses, *(p for _, p in trained), *([] if scaled else [p.grad for _, p in trained])])
        if all_ranks_ok(found):
            return
        self.detach()
        raise TrainingError(
            f"Task {task!r}, step {step}: {culprit(seen, trained)}. The step was not taken, so weights are those of "
            f"step {step - 1}. Lower the learning rate, or look at these rows."
            + "".join(f"\n  {text}" for text in rows_of(seen, tokenizer))
        )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def finite(tensors: list[Any]) -> Tensor:
    """Whether all of them are finite everywhere, as one tensor on their device: [] in bool."""
    if not tensors:
        return torch.tensor(True)
    flags = [local(t.detach()).isfinite().all() for t in tensors]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()


def all_ranks_ok(good: Tensor) -> bool:
    """Whether ``good`` holds in every process."""
    if dist.is_available() and dist.is_initialized():
        flag = good.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)
    return bool(good)


def culprit(seen: list[tuple[Tensor | None, Tensor | None]], trained: list[tuple[str, nn.Parameter]]) -> str:
    """What is not finite here, the cause before its effects."""
    for name, parameter in trained:
        if not bool(finite([parameter])):
            return f"the weight {name!r} is not finite"
    for i, (loss, _) in enumerate(seen):
        if loss is not None and not bool(finite([loss])):
            return f"the loss of micro-batch {i + 1} of {len(seen)} is {float(loss)}"
    for name, parameter in trained:
        if parameter.grad is not None and not bool(finite([parameter.grad])):
            return f"the gradient of {name!r} is not finite"
    return "another process has a loss, gradient or weight that is not finite"


def rows_of(seen: list[tuple[Tensor | None, Tensor | None]], tokenizer: Any) -> list[str]:
    """How the rows of the first bad micro-batch begin; of the last one, if the loss does not tell."""
    bad = [ids for loss, ids in seen if loss is not None and not bool(finite([loss]))]
    ids = next(iter(bad or [ids for _, ids in seen[-1:]]), None)
    if not isinstance(ids, Tensor):
        return []
    return [tokenizer.decode(row[row != tokenizer.pad_token_id][:TOKENS]) for row in ids[:ROWS]]
