"""The model card of a pool, and the picture in it."""

from .write import write_card

__all__ = ["write_card"]
