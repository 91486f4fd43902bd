"""Weighted LoRA aggregation: the one op of the pool. ``reference`` defines it, ``weighted_lora`` computes it fast."""

from . import reference
from .rank_space import gated_lora, rank_gates, weighted_lora

__all__ = ["gated_lora", "rank_gates", "reference", "weighted_lora"]
