"""Train PaLI: configuration, commands, the training loop, and the records of a run."""

import os

from train.caches import set_writable_caches

set_writable_caches(os.environ)  # here, because libraries read these variables when they are imported
