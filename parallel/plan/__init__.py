"""Decide before anything is built: the units, the memory they take, and where the pipeline is cut."""
