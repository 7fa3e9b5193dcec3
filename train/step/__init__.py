"""Do one training step: read, reduce, judge, update, measure."""
