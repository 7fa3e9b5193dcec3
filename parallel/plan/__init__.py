"""Decide what to build: the units, the memory that they take, and where the pipeline is cut. Nothing is started."""
