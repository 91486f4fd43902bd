"""Reports of a grid's results: tables as Markdown, LaTeX and CSV, and pictures."""

from .tables import FORMATS
from .write import write_report

__all__ = ["FORMATS", "write_report"]
