"""Parts of a base model whose rows are not those of its prompts: images, crops, clips of sound.

A pool's weights belong to prompts, one row each. A vision tower may run on several images of one row, on none of
another, and their numbers may agree by chance. So its layers take the weights of the prompts only where each prompt is
seen to have one image, and otherwise only one mixture that holds for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TOWER = re.compile(
    r"vision|visual|image|pixel|patch_embed|video|audio|speech|multi_?modal|\bmm_|connector|resampler|qformer|perceiver"
    r"|abstractor"
)
# what a tower reads: dimensions where the first one counts images or clips, and the tokens that stand for these
READS = {
    "pixel_values": (4, ("image_token_id", "image_token_index")),
    "input_features": (3, ("audio_token_id", "audio_token_index")),
}
OTHER_INPUT = re.compile(r"(pixel_values|input_features|input_values|video|audio|speech)(?!.*mask)")


def tower_of(base: nn.Module, name: str) -> str | None:
    """The part of ``base`` that the module ``name`` is in, if its rows are not the prompts'; else None.

    Where ``base`` itself reads images or sound and no token ids, its rows are those of its prompts.
    """
    if getattr(base, "main_input_name", "input_ids") != "input_ids":
        return None
    parts, module = name.split("."), base
    for depth, part in enumerate(parts, start=1):
        module = getattr(module, part, None)  # type: ignore[assignment]  # a module, or there is none of this name
        reads = module.main_input_name if isinstance(module, PreTrainedModel) else "input_ids"
        if TOWER.search(part) or reads != "input_ids":
            return ".".join(parts[:depth])
    return None


def rows_agree(inputs: Mapping[str, Any], config: Any) -> bool:
    """Whether each prompt among the arguments of a forward is seen to have one image (or one clip) of its own.

    So it is if there are as many as prompts, and all prompts hold equally many of the tokens that stand for one.
    """
    ids = inputs.get("input_ids")
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not OTHER_INPUT.match(name):
            continue
        dimensions, tokens = READS.get(name, (0, ()))
        token = next((found for n in tokens if (found := getattr(config, n, None)) is not None), None)
        if not isinstance(ids, Tensor) or token is None or value.dim() != dimensions or len(value) != len(ids):
            return False
        counts = (ids == token).sum(dim=1)
        if not bool(torch.all(counts == counts[0])) or not int(counts[0]):
            return False
    return True
