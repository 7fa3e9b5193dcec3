"""The miniature corpus: rendered scenes with texts in many languages, made from a seed."""
