"""Where the model lives: process groups, tensor and data parallelism, ZeRO, sharded optimizers, checkpoints."""

import os
import warnings

import torch

# Libraries' notes to their own authors, on import and in every step, would bury what a run says to its user.
warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
if not torch.accelerator.is_available():  # or DeepSpeed looks for one, and warns on every rank
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
