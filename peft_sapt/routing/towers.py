"""Parts of a base model whose rows are not those of its prompts: images, crops, clips of sound, tokens of all rows.

A pool's weights belong to prompts, one row each. A vision tower may run on several images of one row, on none of
another, and their numbers may agree by chance. So its layers take the weights of the prompts only where each prompt is
seen to have one image, and otherwise only one mixture that holds for all.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..pool_module import input_embeddings

TOWER = re.compile(
    r"vision|visual|image|pixel|patch_embed|video|audio|speech|multi_?modal|\bmm_|connector|resampler|qformer|perceiver"
    r"|abstractor|aligner|expert"
)
# layers that run on [S, B, d], whose first dimension is that of positions
TIME_MAJOR = {"xlnet": "", "fsmt": "", "led": "longformer_self_attn", "longformer": r"attention\.self"}
# what a tower reads: dimensions of one image or clip, and the tokens that stand for it
READS = {
    "pixel_values": (3, ("image_token_id", "image_token_index")),
    "input_features": (2, ("audio_token_id", "audio_token_index")),
}
OTHER_INPUT = re.compile(r"(pixel_values|input_features|input_values|video|audio|speech)(?!.*mask)")


def tower_of(base: nn.Module, name: str) -> str | None:
    """The part of ``base`` that the module ``name`` is in, if its rows are not the prompts'; else None.

    So are a part of another kind of input, by its name or class; in a model of several inputs whatever stands outside
    of its text model, but for the head; and layers that run on [S, B, d]. Where ``base`` reads images or sound and no
    token ids, its rows are those of its prompts.
    """
    kind = getattr(getattr(base, "config", None), "model_type", "")
    if kind in TIME_MAJOR and re.search(TIME_MAJOR[kind], name):
        return type(base).__name__
    reads = _reads(base)
    if "input_ids" not in reads and getattr(base, "main_input_name", "input_ids") != "input_ids":
        return None
    parts, module = name.split("."), base
    for depth, part in enumerate(parts, start=1):
        module = getattr(module, part, None)  # type: ignore[assignment]  # a module, or there is none of this name
        own = module.main_input_name if isinstance(module, PreTrainedModel) else "input_ids"
        if TOWER.search(part) or own != "input_ids":
            return ".".join(parts[:depth])
    text = _text_model(base) if any(OTHER_INPUT.match(argument) for argument in reads) else ""
    if text and not name.startswith(f"{text}.") and not re.match(r"(lm_head|score|classifier|output)\b", parts[-1]):
        return ".".join(parts[: 1 + sum(a == b for a, b in zip(parts, text.split("."), strict=False))])
    return None


def _reads(base: nn.Module) -> list[str]:
    return list(inspect.signature(base.forward).parameters)


def _text_model(base: nn.Module) -> str:
    """Name of the innermost model within ``base`` that holds the token embeddings; "" if that is ``base`` itself."""
    table = input_embeddings(base)
    name = next((name for name, module in base.named_modules() if module is table), "") if table is not None else ""
    models = [n for n, m in base.named_modules() if n and isinstance(m, PreTrainedModel) and name.startswith(f"{n}.")]
    return max(models, key=len, default="")


def rows_agree(inputs: Mapping[str, Any], base: nn.Module) -> bool:
    """Whether each prompt among the arguments of a forward of ``base`` is seen to have one image (or clip) of its own.

    So it is if there are as many as prompts, and all prompts hold equally many of the tokens that stand for one; in a
    model without such tokens, if it does not compare texts with images.
    """
    config, ids = getattr(base, "config", None), inputs.get("input_ids")
    if getattr(config, "model_type", "") in TIME_MAJOR:
        return False
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not OTHER_INPUT.match(name):
            continue
        dimensions, tokens = READS.get(name, (-1, ()))
        between = value.shape[1 : value.dim() - dimensions]  # images of a prompt, crops of an image
        if not isinstance(ids, Tensor) or dimensions < 0 or len(value) != len(ids) or math.prod(between) != 1:
            return False
        token = next((found for n in tokens if (found := getattr(config, n, None)) is not None), None)
        if token is None:
            return "return_loss" not in _reads(base)  # an argument of models that compare
        counts = (ids == token).sum(dim=1)
        if not bool(torch.all(counts == counts[0])) or not int(counts[0]):
            return False
    return True
