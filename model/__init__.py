"""The model: a ViT whose patch tokens join the text in the encoder of an mT5, as a list of units."""
