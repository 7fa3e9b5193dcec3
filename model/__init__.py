"""The model: a ViT whose patch tokens join the text in the encoder of an mT5, as a list of units."""

import warnings

# On import Megatron warns that Transformer Engine and Apex are missing; neither is used here.
warnings.filterwarnings("ignore", module=r"megatron\.")
