"""Training recipes: readable examples of the public API. Run them with `lnpu train`."""
