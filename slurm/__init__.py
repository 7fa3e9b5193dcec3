"""Submit jobs to Slurm: the job scripts, the calls of its commands, a snapshot of the code. It imports no training."""
