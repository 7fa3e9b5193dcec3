"""Official metrics as pure functions of (predictions by id, references by id); one file per family."""
