"""Read shards and make packed rows: tokenizer, eight objectives, their mixture, streams."""
