"""Tests on a real Slurm cluster of 4 nodes, which runs on this machine while they run (tests/slurm/cluster)."""
