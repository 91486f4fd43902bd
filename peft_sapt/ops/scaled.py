"""Weighted LoRA aggregation in rank space: one shrink, one scale per rank, one expand, no [T, B, S, O] tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library, reference, torch_kernel
from .dispatch import choose, wanted_kernel
from .spread import rank_scales

FEW_TOKENS = 64  # of a step of generation, up to which two products by torch are as fast as any kernel


@torch.compiler.assume_constant_result
def _chosen(kernel: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose(wanted_kernel(kernel), device, dtype)


def scaled_lora(
    x: Tensor,
    base: Tensor,
    old_a: Tensor | None,
    old_b: Tensor | None,
    new_a: Tensor | None,
    new_b: Tensor | None,
    scales: Tensor,
    *,
    old_gradient: bool = True,
    new_x: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """``base + (x A^T * g) B`` with the frozen blocks stacked along the rank axis and the newest block apart.

    Under autocast, x, base and the factors are cast to its dtype; the scales stay as they are.

    Args:
        x: [B, ..., D].
        base: [B, ..., O]; the result has its shape and dtype.
        old_a, old_b: frozen blocks, [R_old, D] and [R_old, O] (B transposed, so that a block is a run of rows in
            both); None in a pool of one task.
        new_a, new_b: the newest block, [r, D] and [r, O]; None if there is none beside the frozen ones.
        scales: from [`rank_scales`], [B, R_old + r], or with more leading dimensions of x, as [B, S, R_old + r].
        old_gradient: False cuts the gradient through the frozen blocks into ``x``.
        new_x: input of the newest block where it differs from ``x`` (dropout).
        kernel: 'auto', 'reference', 'torch' or 'triton'; PEFT_SAPT_KERNEL in the environment overrides it.

    Raises:
        KernelError: 'triton' is asked for by name and cannot run on these tensors.
        ValueError: a factor is sharded (FSDP, ZeRO).
    """
    refuse_shards({"old_a": old_a, "old_b": old_b, "new_a": new_a, "new_b": new_b})
    if new_x is not None and new_a is not None:  # two inputs are two sums
        first = new_a.shape[0]
        if old_a is not None:
            base = scaled_lora(
                x, base, old_a, old_b, None, None, scales[..., :-first], old_gradient=old_gradient, kernel=kernel
            )
        return scaled_lora(new_x, base, None, None, new_a, new_b, scales[..., -first:], kernel=kernel)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, base = x.to(dtype), base.to(dtype)
        old_a, old_b, new_a, new_b = (f if f is None else f.to(dtype) for f in (old_a, old_b, new_a, new_b))
    name = _chosen(kernel, x.device, x.dtype)
    if name == "reference":
        return _by_definition(x, base, old_a, old_b, new_a, new_b, scales, old_gradient)
    rows = x.reshape(-1, x.shape[-1])  # [N, D]
    flat = base.reshape(-1, base.shape[-1])  # [N, O]
    scales = scales.reshape(-1, scales.shape[-1])  # [G, R]
    tensors = (x, base, old_a, old_b, new_a, new_b, scales)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = library.scaled_lora(rows, flat, old_a, old_b, new_a, new_b, scales, old_gradient, name)
    elif name == "torch":  # without the few microseconds of a custom op, which a token at a time would feel
        h = torch_kernel.shrink(rows, old_a, new_a)
        y = torch_kernel.expand(flat, torch_kernel.scaled(h, scales), old_b, new_b)
    else:
        y = library.scaled_lora_value(rows, flat, old_a, old_b, new_a, new_b, scales, name)
    return y.view(base.shape)


def held_lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scales: Tensor, kernel: str = "auto") -> Tensor:
    """The value of [`scaled_lora`] for blocks in one stack, on the shortest way: a token at a time feels microseconds.

    Args:
        x: [B, S, D]. base: [B, S, O]. a, b: [R, D] and [R, O]. scales: [B, R].
        kernel: as in [`scaled_lora`]; for few tokens 'auto' is torch on a GPU too, where launches are what costs.
    """
    rows = x.reshape(-1, x.shape[-1])  # [B * S, D]
    wanted, device = wanted_kernel(kernel), x.device.type
    short = wanted == "torch" or (wanted == "auto" and (device != "cuda" or len(rows) <= FEW_TOKENS))
    if not short or x.dtype != a.dtype or torch.is_autocast_enabled(device):
        return scaled_lora(x, base, a, b, None, None, scales, kernel=kernel)
    h, flat = torch.mm(rows, a.mT), base.reshape(-1, base.shape[-1])  # [B * S, R], [B * S, O]
    h = h.mul_(scales) if len(scales) == len(h) and scales.dtype == h.dtype else torch_kernel.scaled(h, scales)
    if flat.dtype == h.dtype:
        return torch.addmm(flat, h, b).view(base.shape)
    return torch.mm(h, b).add_(flat).to(base.dtype).view(base.shape)


def _by_definition(
    x: Tensor, base: Tensor, old_a: Tensor | None, old_b: Tensor | None, new_a: Tensor | None, new_b: Tensor | None,
    scales: Tensor, old_gradient: bool,
) -> Tensor:  # fmt: skip
    """Each rank as a block of its own, whose weight is its scale."""
    a_rows = [row for factor in (old_a, new_a) if factor is not None for row in factor.split(1)]
    b_rows = [row.mT for factor in (old_b, new_b) if factor is not None for row in factor.split(1)]
    old = 0 if old_a is None else old_a.shape[0]
    y = reference.weighted_lora(
        x, base, a_rows, b_rows, scales, [1.0] * len(a_rows), newest=old, old_gradient=old_gradient
    )
    return y.to(base.dtype)


def weighted_lora(
    x: Tensor,
    base: Tensor,
    old_a: Tensor | None,
    old_b: Tensor | None,
    new_a: Tensor,
    new_b: Tensor,
    weights: Tensor,
    scaling: Sequence[float],
    old_ranks: Sequence[int] = (),
    *,
    old_gradient: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """``base + sum_t w_t * s_t * B_t A_t x`` (SAPT, section 3.2), in rank space.

    The same value and gradients as [`peft_sapt.ops.reference.weighted_lora`], without its [T, B, S, O] intermediates:
    saved for the backward are ``x`` and h = x A^T [B, S, R], beside the arguments themselves.

    Args:
        x: input of the frozen layer, [B, S, D] or [B, D]; the factors share its dtype (float64, float32, float16 or
            bfloat16). Products accumulate in float32 at least.
        base: output of the frozen layer, [B, S, O] or [B, O]; the result has its dtype.
        old_a, old_b: frozen blocks stacked along the rank axis, oldest first, [R_old, D] and [R_old, O] (each B_t
            transposed), or None. They take a gradient only if they require one.
        new_a, new_b: the block of the newest task, [r, D] and [r, O].
        weights: attention weights, [B, T], or [B, S, T] per token; best in float32.
        scaling: lora_alpha / r of each of the T tasks.
        old_ranks: ranks of the T - 1 frozen blocks, with sum R_old.
        old_gradient: False cuts the gradient through the frozen blocks into ``x``, as the official code does.
        kernel: 'auto' (Triton on CUDA, else torch), 'reference', 'torch' or 'triton'; the environment variable
            PEFT_SAPT_KERNEL overrides it.

    Raises:
        ValueError: shapes, ranks, scaling and weights disagree, or a factor is sharded (FSDP, ZeRO).
        KernelError: 'triton' is asked for by name and cannot run on these tensors; the message has the reason.
    """
    ranks = [*old_ranks, new_a.shape[0]]
    stacked = 0 if old_a is None else old_a.shape[0]
    if sum(old_ranks) != stacked:
        raise ValueError(f"old_ranks {list(old_ranks)} add up to {sum(old_ranks)}, but old_a has {stacked} rows.")
    if not len(ranks) == len(scaling) == weights.shape[-1]:
        raise ValueError(
            f"{len(ranks)} blocks, {len(scaling)} scalings and {weights.shape[-1]} weights per row: give one of each "
            "per task."
        )
    if weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights are for {weights.shape[0]} rows, x has {x.shape[0]}: give one weight row per input."
        )
    check_factors(x, base, {"old_a": old_a, "old_b": old_b, "new_a": new_a, "new_b": new_b})
    scales = rank_scales(weights, scaling, ranks)
    return scaled_lora(x, base, old_a, old_b, new_a, new_b, scales, old_gradient=old_gradient, kernel=kernel)


def refuse_shards(factors: dict[str, Tensor | None]) -> None:
    """Refuse factors of which this process holds a part only."""
    for name, factor in factors.items():
        if hasattr(factor, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor: the op needs whole factors. They are whole inside the forward of a module that "
                "FSDP wraps: wrap decoder layers or the whole model, not the blocks themselves; elsewhere pass "
                "factor.full_tensor()."
            )


def check_factors(x: Tensor, base: Tensor, factors: dict[str, Tensor | None]) -> None:
    """Refuse factors whose shape does not fit x and base."""
    for name, factor in factors.items():
        if factor is None:
            continue
        width = (x if name.endswith("_a") else base).shape[-1]
        if factor.dim() != 2 or factor.shape[1] != width:
            raise ValueError(
                f"{name} has shape {list(factor.shape)}, expected [rank, {width}]: one row per rank, so B_t [O, r] "
                "goes in transposed."
            )
