"""The op as torch sees it: schema, shapes for tracing, gradient, and the choice of the implementation by name.

``peft_sapt::scaled_lora`` maps x [N, D], base [N, O], the factors of the frozen blocks old_a [R_old, D] and old_b
[R_old, O], those of the newest block new_a [r, D] and new_b [r, O] (either pair may be None) and scales [G, R] in
float32, with N a multiple of G, to ``y = base + (x A^T * g) B`` [N, O] and ``h = x A^T`` [N, R]. ``h`` is an output
because a custom op can keep nothing else for its gradient; it takes none itself. Kept are x, h, scales and factors.
``peft_sapt::scaled_lora_value`` is y alone, without a gradient.

A call through torch's dispatcher costs as much as the products of a small model. Where nothing traces the call,
[`ScaledLora`] computes the same, with the same gradient, without it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat import torch_watches
from . import torch_kernel

NAMES = ("x", "old_a", "old_b", "new_a", "new_b", "scales")  # what takes a gradient, beside base

_library = torch.library.Library("peft_sapt", "DEF")  # lives as long as the process
_library.define(
    "scaled_lora(Tensor x, Tensor base, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, Tensor scales, "
    "bool old_gradient, str kernel) -> (Tensor, Tensor)"
)
_library.define(
    "scaled_lora_value(Tensor x, Tensor base, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, "
    "Tensor scales, str kernel) -> Tensor"
)
_library.define(
    "scaled_lora_backward(Tensor dy, Tensor x, Tensor h, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, "
    "Tensor scales, bool old_gradient, bool[] needs, str kernel) -> Tensor[]"
)


def _forward(x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    if kernel == "triton":
        from . import triton_kernel

        return triton_kernel.forward(x, base, old_a, old_b, new_a, new_b, scales)
    return torch_kernel.forward(x, base, old_a, old_b, new_a, new_b, scales)


def _value(x, base, old_a, old_b, new_a, new_b, scales, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    if kernel == "triton":
        from . import triton_kernel

        return triton_kernel.forward(x, base, old_a, old_b, new_a, new_b, scales, split=True)[0]
    return torch_kernel.forward(x, base, old_a, old_b, new_a, new_b, scales)[0]


def _backward(dy, x, h, old_a, old_b, new_a, new_b, scales, old_gradient, needs, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    found = _gradients(dy, x, h, old_a, old_b, new_a, new_b, scales, old_gradient, needs, kernel)
    return [x.new_empty(0) if grad is None else grad for grad in found]  # an op returns tensors, never None


def _gradients(dy, x, h, old_a, old_b, new_a, new_b, scales, old_gradient, needs, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    arguments = (dy, x, h, old_a, old_b, new_a, new_b, scales, old_gradient, needs)
    if kernel == "triton":
        from . import triton_kernel

        return triton_kernel.backward(*arguments)
    return torch_kernel.backward(*arguments)


def _fake_forward(x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], scales.shape[-1])


def _fake_value(x, base, old_a, old_b, new_a, new_b, scales, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, h, old_a, old_b, new_a, new_b, scales, old_gradient, needs, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
    like = (x, old_a, old_b, new_a, new_b, scales)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if n else x.new_empty(0)
            for t, n in zip(like, needs, strict=True)]  # fmt: skip


def _set_up(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, old_a, old_b, new_a, new_b, scales, ctx.old_gradient, ctx.kernel = inputs
    ctx.save_for_backward(x, output[1], old_a, old_b, new_a, new_b, scales)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable  # h is a constant to the gradient, so that a gradient of it would miss a term: it raises instead
def _differentiate(ctx: Any, dy: Tensor | None, dh: None) -> tuple:
    if dy is None:
        return (None,) * 9
    x, h, *factors, scales = ctx.saved_tensors
    need_x, need_base, *rest = ctx.needs_input_grad[:7]
    needs = [need_x, *rest]
    grads: list[Tensor | None] = [None] * len(NAMES)
    if any(needs):
        found = torch.ops.peft_sapt.scaled_lora_backward(
            dy, x, h, *factors, scales, ctx.old_gradient, needs, ctx.kernel
        )
        grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return grads[0], dy if need_base else None, *grads[1:], None, None


class ScaledLora(torch.autograd.Function):
    """``scaled_lora`` for plain tensors in an eager call."""

    @staticmethod
    def forward(ctx, x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel):  # type: ignore[no-untyped-def]  # typed by the schema above
        y, h = _forward(x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel)
        ctx.old_gradient, ctx.kernel = old_gradient, kernel
        ctx.save_for_backward(x, h, old_a, old_b, new_a, new_b, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[no-untyped-def]  # typed by the schema above
        needs = ctx.needs_input_grad
        found = _gradients(dy, *ctx.saved_tensors, ctx.old_gradient, [needs[0], *needs[2:7]], ctx.kernel)
        return found[0], dy if needs[1] else None, *found[1:], None, None


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is no tracer's, and no mode or transform of torch wants to see what is called."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    return not torch_watches()


def scaled_lora(
    x: Tensor, base: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None, new_b: Tensor | None,
    scales: Tensor, old_gradient: bool, kernel: str,
) -> Tensor:  # fmt: skip
    """y with its gradient, on the shortest way that the call allows."""
    if is_plain(x):
        return ScaledLora.apply(x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel)
    y: Tensor = torch.ops.peft_sapt.scaled_lora.default(
        x, base, old_a, old_b, new_a, new_b, scales, old_gradient, kernel
    )[0]
    return y


def scaled_lora_value(
    x: Tensor, base: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None, new_b: Tensor | None,
    scales: Tensor, kernel: str,
) -> Tensor:  # fmt: skip
    """y without a gradient, likewise."""
    if is_plain(x):
        return _value(x, base, old_a, old_b, new_a, new_b, scales, kernel)
    y: Tensor = torch.ops.peft_sapt.scaled_lora_value.default(x, base, old_a, old_b, new_a, new_b, scales, kernel)
    return y


_library.impl("scaled_lora", _forward, "CompositeExplicitAutograd")
_library.impl("scaled_lora_value", _value, "CompositeExplicitAutograd")
_library.impl("scaled_lora_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("peft_sapt::scaled_lora", _fake_forward, lib=_library)
torch.library.register_fake("peft_sapt::scaled_lora_value", _fake_value, lib=_library)
torch.library.register_fake("peft_sapt::scaled_lora_backward", _fake_backward, lib=_library)
torch.library.register_autograd("peft_sapt::scaled_lora", _differentiate, setup_context=_set_up, lib=_library)
