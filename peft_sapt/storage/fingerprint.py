"""A fingerprint of the base model: a few of its numbers, which tell it from another of the same shape.

The numbers themselves are kept, not a hash of them, so that a base in another dtype or with quantised linear
layers still agrees: its embeddings and norms are the same up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PoolFormatError

LAYERS = 8  # of each kind of tensor, evenly spaced, that are sampled by VALUES numbers; the others by FEW
VALUES, FEW = 8, 2
NAMES = 128  # of one kind at most, as where each expert is a tensor of its own
MOST = 64  # values of a tensor that a file may hold
RELATIVE = 2.0**-7  # two roundings to bfloat16 are 2^-8; fine-tuning moves some of so many numbers further
ABSOLUTE = 1e-6
ADAPTER_PARTS = ("sapt_", "modules_to_save", "original_module", "lora_", "_flat_param")

DAMAGED = "The base model's fingerprint in the pool's manifest is malformed: the weights file is damaged."

Fingerprint = dict[str, dict[str, Any]]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's floating-point parameters that lie here in whole, by their names without any adapter.

    A head that the adapter brings along is not the base's: a classifier's is drawn again whenever the base is loaded.
    Numbers of one byte, and packed ones of four bits, mean nothing without their scales.
    """
    found = {}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".").removeprefix("base_model.model.")
        here = parameter.device.type != "meta" and parameter.numel() > 0 and not hasattr(parameter, "full_tensor")
        plain_numbers = (
            parameter.is_floating_point() and parameter.itemsize > 1 and not hasattr(parameter, "quant_state")
        )
        if here and plain_numbers and parameter.dim() > 0 and not any(part in name for part in ADAPTER_PARTS):
            found[plain] = parameter.detach()
    return found


def kind_of(name: str) -> str:
    """What a tensor is, whatever the layer (and expert) that it is in: its name without the numbers."""
    return re.sub(r"\d+", "#", name)


def sampled(tensor: Tensor, count: int, values: int) -> list[float]:
    """At most ``values`` entries, evenly spaced over the first ``count`` ones in the order of memory."""
    places = torch.linspace(0, count - 1, min(values, count), dtype=torch.float64).long()
    return [float(f"{value:.5g}") for value in tensor.reshape(-1)[places.to(tensor.device)].float().tolist()]


def fingerprint(model: nn.Module) -> Fingerprint:
    """Sampled numbers of every kind of tensor of ``model``'s base in every layer, by name; empty where none lies here
    in whole. What has been merged into one kind alone, or into some layers alone, then shows."""
    tensors, kinds = base_tensors(model), defaultdict(list)
    for name in tensors:
        kinds[kind_of(name)].append(name)
    counts = {name: FEW for names in kinds.values() for name in spaced(names, NAMES)}
    counts |= {name: VALUES for names in kinds.values() for name in spaced(names, LAYERS)}
    return {
        name: {"shape": list(tensors[name].shape), "values": sampled(tensors[name], tensors[name].numel(), count)}
        for name, count in sorted(counts.items())
    }


def spaced(names: list[str], most: int) -> list[str]:
    """At most ``most`` of ``names``, evenly spaced, the first and the last among them."""
    return names if len(names) <= most else [names[i * (len(names) - 1) // (most - 1)] for i in range(most)]


def short_print(found: Fingerprint) -> str:
    """Twelve hex digits to show a reader; two bases with the same ones are the same, in the same dtype."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def checked(found: object) -> Fingerprint:
    """``found`` if it is a fingerprint; raises [`PoolFormatError`] if it is not."""
    if not isinstance(found, dict):
        raise PoolFormatError(DAMAGED)
    for known in found.values():
        shape, values = (known.get(key) for key in ("shape", "values")) if isinstance(known, dict) else (None, None)
        if not (isinstance(shape, list) and shape and all(type(size) is int and 0 < size < 2**40 for size in shape)):
            raise PoolFormatError(DAMAGED)
        if not (isinstance(values, list) and all(isinstance(value, float) for value in values)):
            raise PoolFormatError(DAMAGED)
        if not 0 < len(values) <= min(MOST, math.prod(shape)):
            raise PoolFormatError(DAMAGED)
    return found


def differing(found: Fingerprint, model: nn.Module, brought: Container[str] = ()) -> str | None:
    """The name of the first tensor of ``model``'s base that is not the one of ``found``; None if all that can be
    compared agree.

    A tensor is compared if it is here in whole, floating-point, and of the same shape; the first axis may have grown,
    as an embedding for added tokens has. Those ``brought`` by the file itself are not compared.
    """
    here = base_tensors(model)
    for name, known in found.items():
        shape, values, tensor = list(known["shape"]), known["values"], here.get(name)
        if tensor is None or name in brought or list(tensor.shape[1:]) != shape[1:] or len(tensor) < shape[0]:
            continue
        now, then = torch.tensor(sampled(tensor, math.prod(shape), len(values))), torch.tensor(values)
        near = (now - then).abs() <= ABSOLUTE + RELATIVE * then.abs()
        if not bool((near | (now == then) | (now.isnan() & then.isnan())).all()):
            return name
    return None
