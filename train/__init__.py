"""Train PaLI: configuration, commands, the training loop, and the records of a run."""

import gc
import os

from train.caches import set_writable_caches

set_writable_caches(os.environ)  # here, because libraries read these variables when they are imported
# Imports make 400,000 objects that stay. A search for garbage after each 700 of them is a fifth of the time to import
# all of this (0.8 of 4.5 s) -> rare searches until a command begins (train/entry.py).
GARBAGE_THRESHOLD = gc.get_threshold()
gc.set_threshold(50_000, 20, 100)
