"""Which implementation computes the op: the one asked for by name, or the best that can run."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch

from ..compat import why_not_this_triton
from ..errors import KernelError

logger = logging.getLogger(__name__)
KERNELS = ("auto", "reference", "torch", "triton")
VARIABLE = "PEFT_SAPT_KERNEL"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def wanted_kernel(given: str) -> str:
    """The name asked for: the environment variable PEFT_SAPT_KERNEL where it is set, else ``given``."""
    name = os.environ.get(VARIABLE) or given
    if name not in KERNELS:
        source = VARIABLE if os.environ.get(VARIABLE) else "the kernel argument"
        raise KernelError(f"{source} names kernel {name!r}, which does not exist: choose one of {list(KERNELS)}.")
    return name


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """'reference', 'torch' or 'triton' for tensors of this kind.

    Raises:
        KernelError: 'triton' was asked for by name and cannot run here; the message has the reason.
    """
    if name in ("reference", "torch"):
        return name
    reason = why_not_triton(device.type, device.index, dtype)
    if reason is None:
        return "triton"
    if name == "triton":
        raise KernelError(f"The triton kernel was asked for, but {reason} Use kernel='auto' or 'torch' instead.")
    say_once(device.type, reason)
    return "torch"


@cache
def why_not_triton(device: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take such tensors, or None if they can."""
    if dtype not in DTYPES:
        return f"it computes in float32, float16 and bfloat16, not in {dtype}."
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (a CUDA build of torch brings its own)."
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return why_not_this_triton()
    if device != "cuda":
        return f"the tensors are on {device!r}, not on a CUDA device."
    if torch.version.hip is not None:
        return "it was never compiled for ROCm."
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}; it is compiled for 8.0 and newer."
    return why_not_this_triton()


@cache
def say_once(device: str, reason: str) -> None:
    """Log why 'auto' does without Triton: a warning where a GPU is there, since it will be slower than it could be."""
    level = logging.WARNING if device == "cuda" else logging.INFO
    logger.log(level, "kernel='auto' uses the torch implementation of weighted_lora: %s", reason)
