"""Hugging Face `transformers` SiglipVisionModel, with or without the prefix `vision_model.`."""

from model.config import ViTConfig
from model.weights.table import ForeignTensor, Table, weight_and_bias

# The pooling head, the text tower, the contrastive loss, and buffers of old versions.
OTHER_PARTS = ("head.*", "text_model.*", "logit_scale", "logit_bias", "*.position_ids")


def siglip_table(vit: ViTConfig) -> Table:
    """Return the table of a SigLIP vision tower of this size."""
    names = {
        "patches.embedding.bias": "embeddings.patch_embedding.bias",
        "patches.position": "embeddings.position_embedding.weight",
        **weight_and_bias("bridge.vit_norm", "post_layernorm"),
    }
    for i in range(vit.depth):
        ours, theirs = f"vit_block_{i}", f"encoder.layers.{i}"
        for our, their in {
            "attention_norm": "layer_norm1",
            "attention_in.query": "self_attn.q_proj",
            "attention_in.key": "self_attn.k_proj",
            "attention_in.value": "self_attn.v_proj",
            "attention_out.out": "self_attn.out_proj",
            "mlp_norm": "layer_norm2",
            "mlp_in.hidden": "mlp.fc1",
            "mlp_out.out": "mlp.fc2",
        }.items():
            names |= weight_and_bias(f"{ours}.{our}", f"{theirs}.{their}")
    patches = ForeignTensor(  # a convolution's [width, 3, p, p]; ours is [width, p * p * 3]
        "embeddings.patch_embedding.weight",
        read=lambda x: x.permute(0, 2, 3, 1).flatten(1),
        write=lambda x: x.unflatten(1, (vit.patch_size, vit.patch_size, 3)).permute(0, 3, 1, 2),
    )
    tensors = {"patches.embedding.weight": patches} | {ours: ForeignTensor(theirs) for ours, theirs in names.items()}
    return Table(tensors, ignored=OTHER_PARTS, prefixes=("vision_model.",))
