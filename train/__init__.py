"""The run: configuration, entry points, the loop, and what is measured and kept on the way."""

import os

from train.caches import find_a_place

find_a_place(os.environ)  # here, for libraries look for their caches when they are imported
