"""Read downloads as rows: img2dataset tars, tables, JSON Lines of text, and the official formats of data sets."""
