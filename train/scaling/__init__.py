"""Compare the runs of a sweep over model sizes."""
