"""Judge and annotate rows: one small module a step."""
