"""big_vision `models/vit.py` as saved to .npz, with or without the prefixes `params/` and `img/`."""

from collections.abc import Mapping

from torch import Tensor

from model.config import ViTConfig
from model.weights.table import ForeignTensor, Table

# The pooling head, the classifier, the text tower, and temperature and bias of the contrastive loss.
OTHER_PARTS = ("MAPHead_0/*", "head/*", "txt/*", "t", "b")


def big_vision_table(vit: ViTConfig) -> Table:
    """Return the table of a ViT of this size, its blocks not stacked.

    Flax kernels are [in, out], attention kernels [width, heads, head width], the output kernel [heads, head width,
    width].
    """
    width, heads = vit.width, (vit.num_heads, vit.width // vit.num_heads)
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
        for name in ("query", "key", "value"):
            tensors[f"{ours}.attention_in.{name}.weight"] = ForeignTensor(
                f"{attention}/{name}/kernel", lambda x: x.flatten(1).t(), lambda x: x.t().unflatten(1, heads)
            )
            tensors[f"{ours}.attention_in.{name}.bias"] = ForeignTensor(
                f"{attention}/{name}/bias", lambda x: x.flatten(), lambda x: x.unflatten(0, heads)
            )
        tensors[f"{ours}.attention_out.out.weight"] = ForeignTensor(
            f"{attention}/out/kernel", lambda x: x.flatten(0, 1).t(), lambda x: x.t().unflatten(0, heads)
        )
        tensors[f"{ours}.attention_out.out.bias"] = ForeignTensor(f"{attention}/out/bias")
        for our, their in {"mlp_in.hidden": "Dense_0", "mlp_out.out": "Dense_1"}.items():
            tensors[f"{ours}.{our}.weight"] = ForeignTensor(f"{mlp}/{their}/kernel", *dense)
            tensors[f"{ours}.{our}.bias"] = ForeignTensor(f"{mlp}/{their}/bias")
    return Table(tensors, ignored=OTHER_PARTS, prefixes=("params/", "img/"))


def unstack_blocks(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split blocks that `scan=True` stacks along axis 0: `encoderblock/x` [depth, ...] -> `encoderblock_i/x`."""
    flat: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        if "/encoderblock/" in name:
            flat |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): layer for i, layer in enumerate(tensor)}
        else:
            flat[name] = tensor
    return flat
