"""Submit jobs to Slurm: the job scripts, the calls of its commands, a snapshot of the code. Knows no training."""
