"""Pools of the official release (circle-hit/SAPT), taken over."""

from .load import load_official_checkpoint

__all__ = ["load_official_checkpoint"]
