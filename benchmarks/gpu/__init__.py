"""Measure correctness, speed and memory on one GPU in one run; docs/gpu.md is the runbook."""
