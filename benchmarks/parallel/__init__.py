"""Measure layouts over CPU processes: `python -m benchmarks.parallel`."""
