"""SAPT for PEFT: a pool of LoRA blocks under a shared attention, for language models that must keep learning.

Importing this package makes "SAPT" a PEFT method. ``PeftModel`` and the ``AutoPeftModel`` classes are re-exported so
that one import serves both. Only in the console script it waits until a command needs it: PEFT, transformers and torch
take seconds to import, and looking into a saved pool needs none of them.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

SCRIPT = "peft-sapt"


def in_console_script() -> bool:
    """Whether this process is the console script itself, and not one that it has started, or a file of that name."""
    started = Path((getattr(sys, "argv", None) or [""])[0] or "")
    named = started.name in (SCRIPT, f"{SCRIPT}.exe") and not started.is_dir()
    return named and multiprocessing.parent_process() is None


if TYPE_CHECKING or not in_console_script():
    from .registration import (
        ArmCallback,
        AutoPeftModelForCausalLM,
        AutoPeftModelForSeq2SeqLM,
        GeneratorSettings,
        PeftModel,
        PromptMaskCollator,
        SaptConfig,
        SaptLayer,
        SaptModel,
        __version__,
        accept,
        create_optimizer,
        last_complete_checkpoint,
        locked,
        optimizer_groups,
        save_pool,
        training_rows,
    )
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            from . import registration

            return getattr(registration, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "training_rows",
]
