"""Chips: what the files of configs/chips say."""
