"""Weighted LoRA aggregation: the one op of the pool. ``reference`` defines it, ``weighted_lora`` computes it fast."""

from . import reference
from .scaled import held_lora, scaled_lora, weighted_lora
from .spread import rank_scales

__all__ = ["held_lora", "rank_scales", "reference", "scaled_lora", "weighted_lora"]
