"""Prices counts on a chip."""
