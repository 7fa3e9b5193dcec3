"""Benchmarks: timings and memory beside what a user would pick instead (README.md)."""
