"""Divide a model over ranks: process groups, tensor and pipeline parallelism, ZeRO, optimizers, checkpoints."""

import os
import warnings

import torch

# Libraries warn their own authors on import and in every step -> these would bury a run's messages to its user.
warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\.")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
if not torch.accelerator.is_available():  # else DeepSpeed looks for one, and warns on every rank
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
