"""Keep the record of a run: its folder, checkpoints, metrics, tracker and display."""
