"""Callbacks for other projects' training loops. Each module needs its project; this package imports none of them."""
