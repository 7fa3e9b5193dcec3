"""Build a corpus in stages; each stage makes one file a task, and a file that is there is not made again."""
