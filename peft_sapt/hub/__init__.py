"""Pools on the Hugging Face Hub: their cards, and pushing a saved folder."""

from .cards import keep_card, refresh_card
from .push import Push, push_folder

__all__ = ["Push", "keep_card", "push_folder", "refresh_card"]
