"""Seeded mutations of shards, records and settings, against one rule: only our own exceptions, and counts that add up.

`python -m tests.fuzz minutes=30` runs cases until the time is over; `tests/unit/test_fuzz.py` runs a part of them.
A case is a pure function of (kind, seed, number), so a failed one can run again by its number.
"""
