"""Short programs to start from: ask a trained model, train on your own images, launch 8 GPUs."""
