"""Build a parallel model and train it: one interface over every layout."""
