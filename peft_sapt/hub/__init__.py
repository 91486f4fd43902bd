"""Model card and upload of a saved pool."""
