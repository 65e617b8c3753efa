"""Chooses thresholds, rounds and counts by precision class."""
