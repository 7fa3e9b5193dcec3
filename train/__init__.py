"""The run: configuration, entry points, the loop, and what is measured and kept on the way."""

import warnings

# Libraries' notes to their own authors, on import and in every step, would bury what a run says to its user.
warnings.filterwarnings("ignore", module=r"(deepspeed|torch)\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
