"""Hugging Face `transformers` SiglipVisionModel, with or without the prefix `vision_model.`.

SigLIP 2 of a fixed resolution is of the same class.
"""

import re
from collections.abc import Mapping
from typing import Any

from common.errors import ConfigurationError
from model.config import ViTConfig
from model.weights.config_json import whole_number
from model.weights.stored import Stored
from model.weights.table import ForeignTensor, Table, weight_and_bias

# Field of `ViTConfig` -> key of config.json and transformers' default, which the file may leave out.
KEYS = {
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "num_heads": ("num_attention_heads", 12),
    "patch_size": ("patch_size", 16),
}
FIXED = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}  # the others' are not computed

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


def sizes_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that the vision part of a config.json gives.

    Raises ConfigurationError for a model that this one cannot compute.
    """
    for name, value in FIXED.items():
        if (found := config.get(name, value)) != value:
            raise ConfigurationError(f"{where} has {name}={found}, here it is {value}; give a model with that.")
    return {ours: whole_number(config, theirs, default, where) for ours, (theirs, default) in KEYS.items()}


def sizes_from_tensors(stored: Stored) -> dict[str, Any]:
    """Return the fields of `ViTConfig` that the shapes of transformers' tensors give: all but the number of heads."""
    ours = {name.removeprefix("vision_model."): tensor.shape for name, tensor in stored.items()}
    width, _, patch_size, _ = ours["embeddings.patch_embedding.weight"]
    blocks = (re.match(r"encoder\.layers\.(\d+)\.", name) for name in ours)
    return {
        "width": width,
        "depth": 1 + max(int(each[1]) for each in blocks if each),
        "mlp_dim": ours["encoder.layers.0.mlp.fc1.weight"][0],
        "patch_size": patch_size,
    }
