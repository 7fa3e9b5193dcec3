"""Mutants of the core: one small thing changed at a time, to see whether a test notices. `python -m tests.mutants`."""
