"""Pools of the official release (circle-hit/SAPT), taken over."""

from .load import load_release

__all__ = ["load_release"]
