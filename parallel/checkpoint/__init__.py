"""Save and load checkpoints that every layout reads."""
