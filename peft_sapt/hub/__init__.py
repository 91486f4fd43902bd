"""Model card and upload of a saved pool."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import clean_card, refresh_card, write_card
    from .push import Push, push_folder

__all__ = ["Push", "clean_card", "push_folder", "refresh_card", "write_card"]
# imported when asked for: the command line needs a file beside them, and no torch
PLACES = {
    "clean_card": "card",
    "refresh_card": "card",
    "write_card": "card",
    "Push": "push",
    "push_folder": "push",
}


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(import_module(f".{PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
