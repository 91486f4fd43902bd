"""Measuring continual learning."""
