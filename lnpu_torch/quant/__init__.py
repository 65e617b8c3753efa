"""Number formats and precision rules."""
