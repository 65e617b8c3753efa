"""Counts the work of a chip's lanes."""
