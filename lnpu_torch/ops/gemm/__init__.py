"""Products with emulated accumulation."""
