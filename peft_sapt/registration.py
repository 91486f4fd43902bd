"""Makes "SAPT" a PEFT type. The only file that writes to PEFT's namespace: one enum member and the method tables."""

from __future__ import annotations

from peft.utils import PeftType, register_peft_method

from .version import METHOD


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
