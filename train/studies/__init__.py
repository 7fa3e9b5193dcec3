"""Plan, run and report a study: the paper's experiments as sweeps of runs."""
