"""Watch over a run: hangs, signals, slow ranks, memory and profiles."""
