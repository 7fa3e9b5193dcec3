"""Turn what was composed, saved, or named by weights and tasks into the settings of a run, the same on all ranks."""
