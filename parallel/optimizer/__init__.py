"""Update flat shards: Adafactor and AdamW over logical tensors."""
