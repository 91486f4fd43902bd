"""Values of unknown origin in Markdown."""

from __future__ import annotations

import re
from typing import Any


def number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def safe(text: Any) -> str:
    """Text of unknown origin as one line that neither ends a table's cell nor opens a tag or a link."""
    flat = " ".join(str(text).split())
    return re.sub(r"([|<>\[\]`*&\\]|(?<!\w)_|_(?!\w))", lambda found: f"&#{ord(found.group())};", flat)


def code(text: Any) -> str:
    """A name as code; not in backticks, inside which nothing can be escaped."""
    return f"<code>{safe(text)}</code>"
