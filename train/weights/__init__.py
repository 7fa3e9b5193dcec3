"""Find weights that a run begins with: which files or checkpoints they are, and whether they fit the model."""
