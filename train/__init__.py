"""The run: configuration, entry points, the loop, and what is measured and kept on the way."""
