"""Send micro-batches through pipeline stages, to train and to generate."""
