"""Counts what layers and torch's operations do inside a block."""
