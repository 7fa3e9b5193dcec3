"""Evaluate checkpoints on tasks of official files, once or as a training run goes on."""
