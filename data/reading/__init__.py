"""Read steps ahead, in threads or in processes."""
