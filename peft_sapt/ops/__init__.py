"""Weighted LoRA aggregation: the one op of the pool. ``reference`` defines it, ``weighted_lora`` computes it fast."""

from . import reference
from .gated import gated_lora, held_lora, weighted_lora
from .gates import rank_gates

__all__ = ["gated_lora", "held_lora", "rank_gates", "reference", "weighted_lora"]
