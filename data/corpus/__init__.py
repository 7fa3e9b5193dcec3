"""Build corpora, and read all of their text."""
