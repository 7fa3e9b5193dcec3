"""big_vision `models/vit.py` as saved to .npz, with or without the prefixes `params/` and `img/`."""

import re
from typing import Any

import torch

from model.config import PaLIConfig, ViTConfig
from model.weights.stored import Stored, nth_part
from model.weights.table import ForeignTensor, Table

# The pooling head, the classifier, the text tower or language model, temperature and bias of the contrastive loss, and
# the optimizer's state.
OTHER_PARTS = ("MAPHead_0/*", "head/*", "pre_logits/*", "txt/*", "llm/*", "t", "b", "opt/*")

Layout = tuple[tuple[int, int], ...]  # of each dimension of a tensor in flax: its size, and its stride in ours


def big_vision_table(vit: ViTConfig) -> Table:
    """Return the table of a ViT of this size, its blocks not stacked.

    Flax kernels are [in, out], attention kernels [width, heads, head width], the output kernel [heads, head width,
    width].
    """
    width = vit.width
    dense = (lambda x: x.t(), lambda x: x.t())
    tensors = {
        "patches.embedding.weight": ForeignTensor(
            "embedding/kernel",
            lambda x: x.reshape(-1, width).t(),
            lambda x: x.t().reshape(vit.patch_size, vit.patch_size, 3, width),
        ),
        "patches.embedding.bias": ForeignTensor("embedding/bias"),
        "patches.position": ForeignTensor("pos_embedding", lambda x: x.squeeze(0), lambda x: x.unsqueeze(0)),
        "bridge.vit_norm.weight": ForeignTensor("Transformer/encoder_norm/scale"),
        "bridge.vit_norm.bias": ForeignTensor("Transformer/encoder_norm/bias"),
    }
    for i in range(vit.depth):
        ours, theirs = f"vit_block_{i}", f"Transformer/encoderblock_{i}"
        attention, mlp = f"{theirs}/MultiHeadDotProductAttention_0", f"{theirs}/MlpBlock_0"
        for our, their in {"attention_norm": "LayerNorm_0", "mlp_norm": "LayerNorm_1"}.items():
            tensors[f"{ours}.{our}.weight"] = ForeignTensor(f"{theirs}/{their}/scale")
            tensors[f"{ours}.{our}.bias"] = ForeignTensor(f"{theirs}/{their}/bias")
        tensors |= _attention(vit, f"{ours}.attention_in", f"{ours}.attention_out.out", attention)
        for our, their in {"mlp_in.hidden": "Dense_0", "mlp_out.out": "Dense_1"}.items():
            tensors[f"{ours}.{our}.weight"] = ForeignTensor(f"{mlp}/{their}/kernel", *dense)
            tensors[f"{ours}.{our}.bias"] = ForeignTensor(f"{mlp}/{their}/bias")
    return Table(tensors, ignored=OTHER_PARTS, prefixes=("params/", "img/"))


def _attention(vit: ViTConfig, inputs: str, out: str, theirs: str) -> dict[str, ForeignTensor]:
    """Return the tensors of an attention whose maps to query, key and value are `inputs`, and whose last is `out`."""
    heads, tensors = (vit.num_heads, vit.width // vit.num_heads), {}
    for name in ("query", "key", "value"):
        tensors[f"{inputs}.{name}.weight"] = ForeignTensor(
            f"{theirs}/{name}/kernel", lambda x: x.flatten(1).t(), lambda x: x.t().unflatten(1, heads)
        )
        tensors[f"{inputs}.{name}.bias"] = ForeignTensor(
            f"{theirs}/{name}/bias", lambda x: x.flatten(), lambda x: x.unflatten(0, heads)
        )
    tensors[f"{out}.weight"] = ForeignTensor(
        f"{theirs}/out/kernel", lambda x: x.flatten(0, 1).t(), lambda x: x.t().unflatten(0, heads)
    )
    tensors[f"{out}.bias"] = ForeignTensor(f"{theirs}/out/bias")
    return tensors


def flax_layouts(config: PaLIConfig) -> dict[str, Layout]:
    """Return the layout in flax of every matrix of the ViT whose kernel has more than two dimensions there.

    The classifier's are those of big_vision's `MAPHead`.
    """
    vit, width = config.vit, config.vit.width
    if config.tower == "mt5":
        return {}
    attentions = [(f"vit_block_{i}.attention_in", f"vit_block_{i}.attention_out.out") for i in range(vit.depth)]
    kernels = [_attention(vit, inputs, out, "") for inputs, out in [*attentions, ("classifier", "classifier.out")]]
    tensors = {name: (each, width) for some in kernels for name, each in some.items() if name.endswith(".weight")}
    patches = "patches.embedding.weight"
    tensors[patches] = big_vision_table(vit).tensors[patches], 3 * vit.patch_size**2
    flax = {name: each.write(torch.empty(width, inputs, device="meta")) for name, (each, inputs) in tensors.items()}
    return {name: tuple(zip(x.shape, x.stride(), strict=True)) for name, x in flax.items()}


def unstack_blocks(arrays: Stored) -> Stored:
    """Split blocks that `scan=True` stacks along axis 0: `encoderblock/x` [depth, ...] -> `encoderblock_i/x`."""
    flat: Stored = {}
    for name, stored in arrays.items():
        if "/encoderblock/" in name and not name.startswith("opt/"):
            parts = {name.replace("/encoderblock/", f"/encoderblock_{i}/"): i for i in range(stored.shape[0])}
            flat |= {own: nth_part(stored, i) for own, i in parts.items()}
        else:
            flat[name] = stored
    return flat


def sizes_from_tensors(stored: Stored) -> dict[str, Any]:
    """Return the fields of `ViTConfig`: the shapes of big_vision's arrays give all."""
    ours = {name.removeprefix("params/").removeprefix("img/"): each.shape for name, each in stored.items()}
    block = "Transformer/encoderblock_0"
    patch_size, _, _, width = ours["embedding/kernel"]
    blocks = (re.match(r"Transformer/encoderblock_(\d+)/", name) for name in ours)
    return {
        "width": width,
        "depth": 1 + max(int(each[1]) for each in blocks if each),
        "mlp_dim": ours[f"{block}/MlpBlock_0/Dense_0/kernel"][1],
        "num_heads": ours[f"{block}/MultiHeadDotProductAttention_0/query/kernel"][1],
        "patch_size": patch_size,
    }
