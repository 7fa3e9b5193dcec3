"""Submit jobs to Slurm: job scripts, calls of Slurm's commands, a snapshot of the code. It does not import `train`."""
