"""The op in plain torch, for any device: two products per direction, a scale on the rank axis between them.

``tokens`` below is the number of tokens N that one row of ``scales`` [G, R] stands for: N / G.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(x: Tensor, old: Tensor | None, new: Tensor | None) -> Tensor:
    """``x P^T`` for the stacked factor P of old and new rows: x [N, D] -> [N, R]."""
    if old is None or new is None:
        return x @ (old if new is None else new).mT  # type: ignore[union-attr]  # one of the two is there
    h = x.new_empty(x.shape[0], old.shape[0] + new.shape[0])
    torch.mm(x, old.mT, out=h[:, : old.shape[0]])
    torch.mm(x, new.mT, out=h[:, old.shape[0] :])
    return h


def scaled(h: Tensor, scales: Tensor) -> Tensor:
    """``h * g``, each row of scales over its tokens: h [N, R], scales [G, R] -> [N, R] in the dtype of h."""
    scales = scales.to(h.dtype)
    if len(scales) == len(h):
        return h * scales
    return (h.view(len(scales), -1, h.shape[1]) * scales.unsqueeze(1)).view(h.shape)


def expand(base: Tensor | None, h: Tensor, old: Tensor | None, new: Tensor | None) -> Tensor:
    """``base + h P``: h [N, R], P [R, O] in two parts -> [N, O], in the dtype of ``base`` if there is one."""
    first = 0 if old is None else old.shape[0]
    parts = [(h[:, :first], old), (h[:, first:], new)]
    y = base if base is None or base.dtype == h.dtype else base.to(torch.promote_types(base.dtype, h.dtype))
    own = y is not base  # whether y may be written to
    for part, factor in parts:
        if factor is None:
            continue
        if y is None:
            y = part @ factor
        elif y.dtype != h.dtype:
            y = y.add_(part @ factor) if own else y + part @ factor
        else:
            y = y.addmm_(part, factor) if own else torch.addmm(y, part, factor)
        own = True
    assert y is not None
    return y if base is None else y.to(base.dtype)


def forward(
    x: Tensor, base: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None, new_b: Tensor | None,
    scales: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [N, O] and h [N, R]; all arguments as in [`peft_sapt.ops.library`]."""
    h = shrink(x, old_a, new_a)  # [N, R]
    return expand(base, scaled(h, scales), old_b, new_b), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None,
    new_b: Tensor | None, scales: Tensor, old_gradient: bool, needs: list[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, old_a, old_b, new_a, new_b and scales, None where ``needs`` says so.

    With G = dy P_out^T: dx = (G * g) P_in, dA = (G * g)^T x, dB = (h * g)^T dy, dg = sum over tokens of G * h.
    """
    need_x, need_old_a, need_old_b, need_new_a, need_new_b, need_scales = needs
    first = 0 if old_a is None else old_a.shape[0]
    dy = dy.to(x.dtype)
    dx = d_old_a = d_old_b = d_new_a = d_new_b = d_scales = None
    if need_x or need_old_a or need_new_a or need_scales:
        g = shrink(dy, old_b, new_b)  # [N, R]
        if need_scales:
            d_scales = (g * h).view(len(scales), -1, h.shape[1]).sum(dim=1, dtype=scales.dtype)  # [G, R]
        g = scaled(g, scales)
        if need_x:
            if old_gradient or old_a is None:
                dx = expand(None, g, old_a, new_a)
            else:
                dx = torch.zeros_like(x) if new_a is None else expand(None, g[:, first:], None, new_a)
        d_old_a = g[:, :first].mT @ x if need_old_a else None
        d_new_a = g[:, first:].mT @ x if need_new_a else None
    if need_old_b:
        d_old_b = scaled(h[:, :first], scales[:, :first]).mT @ dy
    if need_new_b:
        d_new_b = scaled(h[:, first:], scales[:, first:]).mT @ dy
    return [dx, d_old_a, d_old_b, d_new_a, d_new_b, d_scales]
