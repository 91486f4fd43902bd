"""Pools on the Hugging Face Hub: their model card, and pushing a saved folder."""

from .card import clean_card, refresh_card, write_card
from .push import Push, push_folder

__all__ = ["Push", "clean_card", "push_folder", "refresh_card", "write_card"]
