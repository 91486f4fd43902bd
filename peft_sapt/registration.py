"""Makes "SAPT" a PEFT type. The only file that writes to PEFT's namespace: one enum member and the method tables."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

NAME = "SAPT"


def add_peft_type() -> None:
    """Add SAPT to the str-enum ``PeftType``; ``register_peft_method`` takes no name outside of it. Idempotent.

    Enums are closed by design, so the member is built by hand: all three member maps know it, and on Python >= 3.12,
    where members are looked up as class attributes, the class does too. Pickle, copy, JSON and ``.value`` then work.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register(config_cls: type, model_cls: type) -> None:
    """Register the method with PEFT; a second call, as after a module reload, changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    add_peft_type()
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="sapt", config_cls=config_cls, model_cls=model_cls, prefix="sapt_")
