"""The command line: ``peft-sapt train | eval | bench | report | pool``."""

from .main import main

__all__ = ["main"]
