"""What the model reads: shards, tokenizer, the eight objectives, their mixture, packed rows."""
