"""The op as torch sees it: schema, shapes for tracing, gradient, and the choice of the implementation by name.

``peft_sapt::gated_lora`` maps x [N, D], base [N, O], the factors of the frozen blocks old_a [R_old, D] and old_b
[R_old, O], those of the newest block new_a [r, D] and new_b [r, O] (either pair may be None) and gates [G, R] in
float32, with N a multiple of G, to ``y = base + (x A^T * g) B`` [N, O] and ``h = x A^T`` [N, R]. ``h`` is an output
because a custom op can keep nothing else for its gradient; it takes none itself. Kept are x, h, gates and factors.
``peft_sapt::gated_lora_value`` is y alone, without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import torch_kernel

NAMES = ("x", "old_a", "old_b", "new_a", "new_b", "gates")  # what takes a gradient, beside base

_library = torch.library.Library("peft_sapt", "DEF")  # lives as long as the process
_library.define(
    "gated_lora(Tensor x, Tensor base, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, Tensor gates, "
    "bool old_gradient, str kernel) -> (Tensor, Tensor)"
)
_library.define(
    "gated_lora_value(Tensor x, Tensor base, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, "
    "Tensor gates, str kernel) -> Tensor"
)
_library.define(
    "gated_lora_backward(Tensor dy, Tensor x, Tensor h, Tensor? old_a, Tensor? old_b, Tensor? new_a, Tensor? new_b, "
    "Tensor gates, bool old_gradient, bool[] needs, str kernel) -> Tensor[]"
)


def _forward(x, base, old_a, old_b, new_a, new_b, gates, old_gradient, kernel):  # type: ignore[no-untyped-def]
    if kernel == "triton":
        from . import triton_kernel

        return triton_kernel.forward(x, base, old_a, old_b, new_a, new_b, gates)
    return torch_kernel.forward(x, base, old_a, old_b, new_a, new_b, gates)


def _value(x, base, old_a, old_b, new_a, new_b, gates, kernel):  # type: ignore[no-untyped-def]
    if kernel == "triton":
        from . import triton_kernel

        return triton_kernel.forward(x, base, old_a, old_b, new_a, new_b, gates, split=True)[0]
    return torch_kernel.forward(x, base, old_a, old_b, new_a, new_b, gates)[0]


def _backward(dy, x, h, old_a, old_b, new_a, new_b, gates, old_gradient, needs, kernel):  # type: ignore[no-untyped-def]
    arguments = (dy, x, h, old_a, old_b, new_a, new_b, gates, old_gradient, needs)
    if kernel == "triton":
        from . import triton_kernel

        found = triton_kernel.backward(*arguments)
    else:
        found = torch_kernel.backward(*arguments)
    return [x.new_empty(0) if grad is None else grad for grad in found]  # an op returns tensors, never None


def _fake_forward(x, base, old_a, old_b, new_a, new_b, gates, old_gradient, kernel):  # type: ignore[no-untyped-def]
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty(x.shape[0], gates.shape[-1])


def _fake_value(x, base, old_a, old_b, new_a, new_b, gates, kernel):  # type: ignore[no-untyped-def]
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, h, old_a, old_b, new_a, new_b, gates, old_gradient, needs, kernel):  # type: ignore[no-untyped-def]
    like = (x, old_a, old_b, new_a, new_b, gates)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if n else x.new_empty(0)
            for t, n in zip(like, needs, strict=True)]  # fmt: skip


def _set_up(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, _, old_a, old_b, new_a, new_b, gates, ctx.old_gradient, ctx.kernel = inputs
    ctx.save_for_backward(x, output[1], old_a, old_b, new_a, new_b, gates)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@once_differentiable  # h is a constant to the gradient, so that a gradient of it would miss a term: it raises instead
def _differentiate(ctx: Any, dy: Tensor | None, dh: None) -> tuple:
    if dy is None:
        return (None,) * 9
    x, h, *factors, gates = ctx.saved_tensors
    need_x, need_base, *rest = ctx.needs_input_grad[:7]
    needs = [need_x, *rest]
    grads: list[Tensor | None] = [None] * len(NAMES)
    if any(needs):
        found = torch.ops.peft_sapt.gated_lora_backward(dy, x, h, *factors, gates, ctx.old_gradient, needs, ctx.kernel)
        grads = [grad if needed else None for grad, needed in zip(found, needs, strict=True)]
    return grads[0], dy if need_base else None, *grads[1:], None, None


_library.impl("gated_lora", _forward, "CompositeExplicitAutograd")
_library.impl("gated_lora_value", _value, "CompositeExplicitAutograd")
_library.impl("gated_lora_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("peft_sapt::gated_lora", _fake_forward, lib=_library)
torch.library.register_fake("peft_sapt::gated_lora_value", _fake_value, lib=_library)
torch.library.register_fake("peft_sapt::gated_lora_backward", _fake_backward, lib=_library)
torch.library.register_autograd("peft_sapt::gated_lora", _differentiate, setup_context=_set_up, lib=_library)

gated_lora = torch.ops.peft_sapt.gated_lora.default
gated_lora_value = torch.ops.peft_sapt.gated_lora_value.default
