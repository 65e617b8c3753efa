"""Counts the pairs of operands that a product multiplies, by precision class."""
