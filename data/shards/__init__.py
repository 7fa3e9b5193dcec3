"""Read and write WebDataset tars: their paths, their index, their records."""
