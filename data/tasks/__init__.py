"""Read the official files of evaluation tasks as items: a question or caption each, with id and references."""
