"""Makes "SAPT" a PEFT method as it is imported. The only file that writes to PEFT's namespace: one enum member and the
method tables."""

from __future__ import annotations

from .compat import check_installed

check_installed()

from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, PeftModel  # noqa: E402
from peft.utils import PeftType, register_peft_method  # noqa: E402

from .version import METHOD, __version__  # noqa: E402


def add_peft_type() -> None:
    """Add SAPT to the str-enum ``PeftType``; ``register_peft_method`` takes no name outside of it. Idempotent.

    Enums are closed by design, so the member is built by hand: all three member maps know it, and on Python >= 3.12,
    where members are looked up as class attributes, the class does too. Pickle, copy, JSON and ``.value`` then work.
    """
    if METHOD in PeftType.__members__:
        return
    member = str.__new__(PeftType, METHOD)
    member._name_ = METHOD
    member._value_ = METHOD
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]  # set by EnumType, untyped
    PeftType._member_map_[METHOD] = member
    PeftType._member_names_.append(METHOD)
    PeftType._value2member_map_[METHOD] = member
    type.__setattr__(PeftType, METHOD, member)


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT; a second call, as after a module reload, changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    add_peft_type()
    if PeftType[METHOD] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="sapt", config_cls=config_cls, model_cls=model_cls, prefix="sapt_")


add_peft_type()  # which the files below ask for as they are imported

from .arm import ArmCallback, GeneratorSettings, last_complete_checkpoint  # noqa: E402
from .collator import PromptMaskCollator, training_rows  # noqa: E402
from .config import SaptConfig  # noqa: E402
from .layer import SaptLayer  # noqa: E402
from .model import SaptModel  # noqa: E402
from .optimizer import create_optimizer, optimizer_groups  # noqa: E402
from .pool.model_methods import keep_cards_of  # noqa: E402
from .pool.save_pool import locked, save_pool  # noqa: E402
from .routing.optimizers import watch_optimizers  # noqa: E402
from .storage.overrides import accept  # noqa: E402

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
    "training_rows",
]
