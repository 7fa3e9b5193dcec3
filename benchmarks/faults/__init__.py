"""Inject faults into real training jobs: `python -m benchmarks.faults`."""
