"""Weights in and out by the names of logical tensors: Hugging Face's MT5 and SigLIP vision tower, big_vision's ViT.

A `Table` says where each logical tensor lies in a foreign checkpoint. `import_tensors` and `export_tensors` translate
whole dictionaries, `load` puts logical tensors into a model of any tensor-parallel size (or into one pipeline stage
of it).
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.files import beside
from model.config import MT5Config, ViTConfig
from model.finite import first_not_finite
from model.layers import parameter_parts
from model.pali import local_block
from model.vit import resample_position


@dataclass(frozen=True)
class Foreign:
    """A logical tensor's name elsewhere, and how to turn it to (`write`) and from (`read`) the way it lies there."""

    name: str
    read: Callable[[Tensor], Tensor] = lambda x: x
    write: Callable[[Tensor], Tensor] = lambda x: x


Table = dict[str, Foreign]

# What a checkpoint may hold beside the table: copies of tied tensors, pooling heads, the other tower, old position ids.
NOT_OURS = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "*.EncDecAttention.relative_attention_bias.weight",
    "head.*",
    "text_model.*",
    "logit_scale",
    "logit_bias",
    "*.position_ids",
    "MAPHead_0/*",
    "head/*",
    "txt/*",
    "t",
    "b",
)


def mt5_table(mt5: MT5Config) -> Table:
    """`transformers` MT5ForConditionalGeneration; T5 checkpoints of version 1.1 have the same names."""
    names = {
        "bridge.embedding.weight": "shared.weight",
        "encoder_norm.norm.weight": "encoder.final_layer_norm.weight",
        "head.norm.weight": "decoder.final_layer_norm.weight",
        "head.output.weight": "lm_head.weight",
    }
    for stack, layers in (("encoder", mt5.num_encoder_layers), ("decoder", mt5.num_decoder_layers)):
        names[f"bridge.{stack}_bias.weight"] = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for i in range(layers):
            ours, theirs = f"{stack}_block_{i}", f"{stack}.block.{i}.layer"
            mlp = f"{theirs}.{1 if stack == 'encoder' else 2}"
            names |= {
                f"{ours}.attention_norm.weight": f"{theirs}.0.layer_norm.weight",
                f"{ours}.attention_in.query.weight": f"{theirs}.0.SelfAttention.q.weight",
                f"{ours}.attention_in.key.weight": f"{theirs}.0.SelfAttention.k.weight",
                f"{ours}.attention_in.value.weight": f"{theirs}.0.SelfAttention.v.weight",
                f"{ours}.attention_out.out.weight": f"{theirs}.0.SelfAttention.o.weight",
                f"{ours}.mlp_norm.weight": f"{mlp}.layer_norm.weight",
                f"{ours}.mlp_in.gate.weight": f"{mlp}.DenseReluDense.wi_0.weight",
                f"{ours}.mlp_in.up.weight": f"{mlp}.DenseReluDense.wi_1.weight",
                f"{ours}.mlp_out.out.weight": f"{mlp}.DenseReluDense.wo.weight",
            }
            if stack == "decoder":
                names |= {
                    f"{ours}.cross_norm.weight": f"{theirs}.1.layer_norm.weight",
                    f"{ours}.cross_query.query.weight": f"{theirs}.1.EncDecAttention.q.weight",
                    f"{ours}.cross_memory.key.weight": f"{theirs}.1.EncDecAttention.k.weight",
                    f"{ours}.cross_memory.value.weight": f"{theirs}.1.EncDecAttention.v.weight",
                    f"{ours}.cross_out.out.weight": f"{theirs}.1.EncDecAttention.o.weight",
                }
    return {ours: Foreign(theirs) for ours, theirs in names.items()}


def siglip_table(vit: ViTConfig) -> Table:
    """`transformers` SiglipVisionModel, with or without the prefix `vision_model.`; its pooling head is left out."""
    names = {
        "patches.embedding.bias": "embeddings.patch_embedding.bias",
        "patches.position": "embeddings.position_embedding.weight",
        **_weight_and_bias("bridge.vit_norm", "post_layernorm"),
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
            names |= _weight_and_bias(f"{ours}.{our}", f"{theirs}.{their}")
    patches = Foreign(  # a convolution's [width, 3, p, p]; ours is [width, p * p * 3]
        "embeddings.patch_embedding.weight",
        read=lambda x: x.permute(0, 2, 3, 1).flatten(1),
        write=lambda x: x.unflatten(1, (vit.patch_size, vit.patch_size, 3)).permute(0, 3, 1, 2),
    )
    return {"patches.embedding.weight": patches} | {ours: Foreign(theirs) for ours, theirs in names.items()}


def big_vision_table(vit: ViTConfig) -> Table:
    """big_vision `models/vit.py` as saved to .npz (not scanned), with or without the prefixes `params/` and `img/`.

    Flax kernels are [in, out]; attention kernels [width, heads, head width], the output kernel [heads, head width,
    width].
    """
    width, heads = vit.width, (vit.num_heads, vit.width // vit.num_heads)
    dense = (lambda x: x.t(), lambda x: x.t())
    table: Table = {
        "patches.embedding.weight": Foreign(
            "embedding/kernel",
            lambda x: x.reshape(-1, width).t(),
            lambda x: x.t().reshape(vit.patch_size, vit.patch_size, 3, width),
        ),
        "patches.embedding.bias": Foreign("embedding/bias"),
        "patches.position": Foreign("pos_embedding", lambda x: x.squeeze(0), lambda x: x.unsqueeze(0)),
        "bridge.vit_norm.weight": Foreign("Transformer/encoder_norm/scale"),
        "bridge.vit_norm.bias": Foreign("Transformer/encoder_norm/bias"),
    }
    for i in range(vit.depth):
        ours, theirs = f"vit_block_{i}", f"Transformer/encoderblock_{i}"
        attention, mlp = f"{theirs}/MultiHeadDotProductAttention_0", f"{theirs}/MlpBlock_0"
        for our, their in {"attention_norm": "LayerNorm_0", "mlp_norm": "LayerNorm_1"}.items():
            table[f"{ours}.{our}.weight"] = Foreign(f"{theirs}/{their}/scale")
            table[f"{ours}.{our}.bias"] = Foreign(f"{theirs}/{their}/bias")
        for name in ("query", "key", "value"):
            table[f"{ours}.attention_in.{name}.weight"] = Foreign(
                f"{attention}/{name}/kernel", lambda x: x.flatten(1).t(), lambda x: x.t().unflatten(1, heads)
            )
            table[f"{ours}.attention_in.{name}.bias"] = Foreign(
                f"{attention}/{name}/bias", lambda x: x.flatten(), lambda x: x.unflatten(0, heads)
            )
        table[f"{ours}.attention_out.out.weight"] = Foreign(
            f"{attention}/out/kernel", lambda x: x.flatten(0, 1).t(), lambda x: x.t().unflatten(0, heads)
        )
        table[f"{ours}.attention_out.out.bias"] = Foreign(f"{attention}/out/bias")
        for our, their in {"mlp_in.hidden": "Dense_0", "mlp_out.out": "Dense_1"}.items():
            table[f"{ours}.{our}.weight"] = Foreign(f"{mlp}/{their}/kernel", *dense)
            table[f"{ours}.{our}.bias"] = Foreign(f"{mlp}/{their}/bias")
    return table


def import_tensors(foreign: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The logical tensors of a foreign state dict.

    Raises ConfigurationError if a tensor of the table is missing, or one is there that the table does not know.
    """
    found = {_without_prefix(name): tensor for name, tensor in foreign.items()}
    wanted = {entry.name for entry in table.values()}
    if "lm_head.weight" in wanted and "shared.weight" in found:
        found.setdefault("lm_head.weight", found["shared.weight"])  # transformers 5 ties them and saves one
    missing = wanted - found.keys()
    unknown = [name for name in found.keys() - wanted if not any(fnmatchcase(name, pattern) for pattern in NOT_OURS)]
    if missing or unknown:
        complaints = [
            f"{what} {_some(names)}" for what, names in (("lacks", missing), ("also holds", unknown)) if names
        ]
        raise ConfigurationError(
            f"The checkpoint {' and '.join(complaints)}; choose the vit= or mt5= size it was made with."
        )
    return {ours: entry.read(found[entry.name]).contiguous() for ours, entry in table.items()}


def export_tensors(logical: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The foreign state dict of the table's tensors. Raises ConfigurationError if one is missing."""
    missing = table.keys() - logical.keys()
    if missing:
        raise ConfigurationError(f"The model lacks {_some(missing)}; export it with the sizes it was trained with.")
    return {entry.name: entry.write(logical[ours]).contiguous() for ours, entry in table.items()}


def logical_tensors(
    module: nn.Module, of: Callable[[nn.Parameter], Tensor | None] = lambda p: p.detach()
) -> dict[str, Tensor]:
    """Logical name -> whole tensor, of a model without tensor parallelism; `of` picks another, such as the gradient."""
    tensors = {}
    for parameter, part in parameter_parts(module):
        assert part.block == part.shape, "tensor parallel: this rank holds only a block"
        chosen = of(parameter)
        if chosen is not None:
            tensors[part.name] = local_block(chosen, part)
    return tensors


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's block of every tensor whose name the module has; others (of other stages) are passed over.

    Position embeddings of another resolution are resampled. Raises ConfigurationError for a shape that does not fit.
    """
    for parameter, part in parameter_parts(module):
        if part.name not in tensors:
            continue
        tensor = tensors[part.name]
        if part.name.endswith("patches.position") and tensor.shape[1:] == part.shape[1:]:
            tensor = resample_position(tensor, part.shape[0])
        if tensor.shape != part.shape:
            raise ConfigurationError(
                f"{part.name} is {list(tensor.shape)} in the checkpoint but {list(part.shape)} in the model; "
                "choose the vit= or mt5= size it was made with."
            )
        block = tuple(slice(start, start + size) for start, size in zip(part.offset, part.block, strict=True))
        local_block(parameter, part).copy_(tensor[block])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, of a folder of them, or of an .npz file (nothing is unpickled)."""
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return _unscanned({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or any(file.suffix != ".safetensors" or not file.is_file() for file in files):
        raise ConfigurationError(f"{path} is neither a .safetensors file, a folder of them, nor an .npz file.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Save a state dict in one piece, as .safetensors, or as .npz if the name ends so.

    Raises ValueError for what is not finite, and OSError where the disk takes no more.
    """
    if (name := first_not_finite(tensors.items())) is not None:
        raise ValueError(f"{name} is not finite, so {path} is not written.")
    with beside(Path(path)) as scratch:
        if Path(path).suffix == ".npz":
            arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            with scratch.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            try:
                save_file(dict(tensors), scratch, metadata={"format": "pt"})
            except SafetensorError as error:  # it holds the error of the system as text alone
                if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
                    raise
                raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _unscanned(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """big_vision's `scan=True` stacks the blocks along axis 0: `encoderblock/x` [depth, ...] -> `encoderblock_i/x`."""
    flat: dict[str, Tensor] = {}
    for name, tensor in arrays.items():
        if "/encoderblock/" in name:
            flat |= {name.replace("/encoderblock/", f"/encoderblock_{i}/"): layer for i, layer in enumerate(tensor)}
        else:
            flat[name] = tensor
    return flat


def _weight_and_bias(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def _without_prefix(name: str) -> str:
    for prefix in ("vision_model.", "params/", "img/"):
        name = name.removeprefix(prefix)
    return name


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
