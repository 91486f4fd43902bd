"""The model card of a pool, and the picture in it."""

from .write import clean_card, write_card

__all__ = ["clean_card", "write_card"]
