"""Make the data card of a corpus: counts, figures, one HTML page."""
