"""ARM, the attentive reflection module: generator, pseudo-samples, the attention loss, and the Trainer callback."""

from ..storage.checkpoints import last_complete_checkpoint
from .callback import ArmCallback
from .generator import GeneratorSettings
from .objective import align_attention, attention_loss
from .pseudo import PseudoReport

__all__ = [
    "ArmCallback",
    "GeneratorSettings",
    "PseudoReport",
    "align_attention",
    "attention_loss",
    "last_complete_checkpoint",
]
