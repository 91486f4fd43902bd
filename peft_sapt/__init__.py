"""SAPT for PEFT: a pool of LoRA blocks under a shared attention, for language models that must keep learning.

Importing this package makes "SAPT" a PEFT method. ``PeftModel`` and the ``AutoPeftModel`` classes are re-exported so
that one import serves both.
"""

from .compat import check_installed

check_installed()

from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel  # noqa: E402

from .registration import add_peft_type  # noqa: E402

add_peft_type()

from .arm import ArmCallback, GeneratorSettings, last_complete_checkpoint  # noqa: E402
from .collator import PromptMaskCollator  # noqa: E402
from .config import SaptConfig  # noqa: E402
from .layer import SaptLayer  # noqa: E402
from .model import SaptModel  # noqa: E402
from .optimizer import create_optimizer, optimizer_groups  # noqa: E402
from .pool.model_methods import keep_cards_of  # noqa: E402
from .pool.save_pool import locked, save_pool  # noqa: E402
from .registration import register  # noqa: E402
from .routing.optimizers import watch_optimizers  # noqa: E402
from .storage.overrides import accept  # noqa: E402
from .version import __version__  # noqa: E402

register(SaptConfig, SaptModel)
keep_cards_of(SaptModel)
watch_optimizers()

__all__ = [
    "ArmCallback",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForSeq2SeqLM",
    "GeneratorSettings",
    "PeftModel",
    "PromptMaskCollator",
    "SaptConfig",
    "SaptLayer",
    "SaptModel",
    "__version__",
    "accept",
    "create_optimizer",
    "last_complete_checkpoint",
    "locked",
    "optimizer_groups",
    "save_pool",
]
