"""Where the model lives: process groups, tensor and data parallelism, ZeRO, sharded optimizers, checkpoints."""
