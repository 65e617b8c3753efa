"""Emulated layers, and the conversion of models to them."""
