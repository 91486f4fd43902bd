"""Reports of a grid's results: tables as Markdown, LaTeX and CSV, and pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tables import FORMATS
    from .write import write_report

__all__ = ["FORMATS", "write_report"]
# imported when asked for: the command line needs a file beside them, and no torch
PLACES = {
    "FORMATS": "tables",
    "write_report": "write",
}


def __getattr__(name: str) -> Any:
    if name in PLACES:
        return getattr(import_module(f".{PLACES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
