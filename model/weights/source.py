"""Open the weights of a tower wherever they come from: find out the format, the sizes and what is left out.

Formats: folders of Hugging Face transformers (mT5, umT5, T5 1.1, Flan-T5; SigLIP, SigLIP 2 of a fixed resolution), an
export of ours, .safetensors files with names of transformers or of ours, and big_vision's .npz.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from model.config import MT5Config, ViTConfig
from model.weights import big_vision, mt5, siglip
from model.weights.config_json import part, read_config_json
from model.weights.stored import Stored, listed, open_tensors
from model.weights.table import Table, import_stored, match

VIT_PREFIXES = ("patches.", "vit_block_", "bridge.vit_norm.")
PROJECTION_PREFIX = "bridge.projection."  # from ViT to mT5; of neither tower
CLASSIFIER_PREFIX = "classifier."  # of a ViT that was pretrained alone; of neither tower
SIZES = {"vit": ViTConfig, "mt5": MT5Config}
TOWERS = {"vit": "ViT", "mt5": "mT5"}
EXPORT = "pali"  # model_type of an export of ours
VOCABULARY = "vocabulary_sha256"  # in the config.json of an export's text part: SHA-256 of its tokenizer's pieces
WANTED = {
    "mt5": "mT5, umT5, T5 1.1 or Flan-T5",
    "vit": "SigLIP or SigLIP 2 of a fixed resolution, or an .npz file of big_vision",
}
EXPORT_PROJECTION = {f"bridge.{name}": name for name in ("projection.weight", "projection.bias")}


@dataclass(frozen=True)
class Source:
    """The weights of one tower in files.

    `where`: the setting and the path, which begin a message. `sizes`: the fields of `ViTConfig` or `MT5Config` that the
    files give. `left_out`: names, in the files, of tensors that are not the tower's. `projection`: the map between the
    towers, where the files hold it. `vocabulary`: the SHA-256 of the tokenizer's pieces, which an export of ours holds.
    """

    where: str
    kind: str
    sizes: Mapping[str, Any]
    tensors: Stored
    left_out: list[str] = field(default_factory=list)
    projection: Stored = field(default_factory=dict)
    vocabulary: str | None = None


def is_of_tower(name: str, tower: str) -> bool:
    """Return whether a logical tensor belongs to the ViT (`vit`) or to the mT5 (`mt5`)."""
    if name.startswith((PROJECTION_PREFIX, CLASSIFIER_PREFIX)):
        return False
    return name.startswith(VIT_PREFIXES) == (tower == "vit")


def open_source(path: str | Path, tower: str, num_heads: int | None = None, key: str = "") -> Source:
    """Open the weights of the ViT (`vit`) or of the mT5 (`mt5`); none are read.

    `num_heads`: that of the ViT, for files whose shapes do not show it. `key`: the setting that names the path,
    `weights.TOWER` by default. Raises ConfigurationError for files that are no such tower, are not whole, or are of
    another model.
    """
    key = key or f"weights.{tower}"
    path, where = Path(path), f"{key}={path}"
    if not path.exists():
        name = str(path)
        public = f" (hf download {name} --local-dir {path.name} fetches a public one)" if name.count("/") == 1 else ""
        raise ConfigurationError(f"{where} does not exist; name a folder or a file of weights{public}.")
    config = read_tower_config(path, tower, where)
    stored = open_tensors(path, key)
    if any(is_of_tower(name, other) and _is_logical(name) for name in stored for other in SIZES):
        return _logical(stored, tower, where)
    try:
        return _foreign(stored, config, tower, where, num_heads)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{where} holds no {TOWERS[tower]} (it begins with {listed(stored)}); give {WANTED[tower]}."
        ) from error


def _foreign(stored: Stored, config: dict[str, Any] | None, tower: str, where: str, heads: int | None) -> Source:
    """Open a tower under the names of transformers or big_vision; KeyError where its first tensors are missing."""
    table: Table
    if tower == "mt5":
        if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in stored and config is None:
            raise ConfigurationError(f"{where} is a T5 of version 1.0, whose MLP is another; give {WANTED[tower]}.")
        sizes = mt5.sizes_from_config(config, where) if config else mt5.sizes_from_tensors(stored)
        kind = mt5.NAMES[str(config["model_type"])] if config else "umT5" if sizes["bias_per_layer"] else "mT5"
        table = mt5.mt5_table(MT5Config(**sizes), mt5.output_scale(config or {}, stored))
    elif any(name.endswith("pos_embedding") for name in stored):
        stored, kind = big_vision.unstack_blocks(stored), "ViT of big_vision"
        if {"cls", "params/cls"} & stored.keys():
            raise ConfigurationError(f"{where} is a ViT with a class token; give one without, such as SigLIP's.")
        sizes = big_vision.sizes_from_tensors(stored)
        table = big_vision.big_vision_table(ViTConfig(**sizes))
    else:
        kind = "SigLIP"
        sizes = siglip.sizes_from_config(config, where) if config else siglip.sizes_from_tensors(stored)
        table = siglip.siglip_table(ViTConfig(**{"num_heads": heads or 1} | sizes))
    others = {}
    if config and config.get("part_of") == EXPORT:
        others = {name: x for name, x in stored.items() if _tower_in_export(name) != tower}
        stored = {name: x for name, x in stored.items() if name not in others}
    elif config is None and tower == "vit":
        stored = {name: x for name, x in stored.items() if not name.startswith("projection.")}
    found = match(stored, table, where, f"it is no whole {kind}: download it again, or give another")
    every = stored | others
    projection = {ours: every[name] for ours, name in EXPORT_PROJECTION.items() if name in every}
    tensors = import_stored(stored, table, found.names)
    left_out = sorted({*found.left_out, *others} - set(EXPORT_PROJECTION.values()))
    return Source(where, kind, sizes, tensors, left_out, projection, (config or {}).get(VOCABULARY))


def _tower_in_export(name: str) -> str | None:
    """Return the tower of a tensor of an export, None for the projection between the towers."""
    return "vit" if name.startswith("vision_model.") else None if name.startswith("projection.") else "mt5"


def _logical(stored: Stored, tower: str, where: str) -> Source:
    """Open a file of our own names, as `train.pretrain_vit` writes."""
    own = {name: x for name, x in stored.items() if is_of_tower(name, tower) and _is_logical(name)}
    if not own:
        raise ConfigurationError(f"{where} holds no {TOWERS[tower]} (but {listed(stored)}); give a file that does.")
    if unknown := [name for name in stored if not _is_logical(name)]:
        raise ConfigurationError(f"{where} also holds {listed(unknown)}, which no unit has; leave them out.")
    projection = {name: x for name, x in stored.items() if name.startswith(PROJECTION_PREFIX)}
    left_out = sorted(stored.keys() - own.keys() - projection.keys())
    try:
        sizes = (_vit_sizes if tower == "vit" else _mt5_sizes)(own)
    except (KeyError, ValueError):  # its first block is missing -> comparing tensors names what is
        sizes = {}
    return Source(where, f"{TOWERS[tower]} of our names", sizes, own, left_out, projection)


def _is_logical(name: str) -> bool:
    units = r"patches|vit_block_\d+|bridge|encoder_block_\d+|encoder_norm|decoder_block_\d+|head"
    inner = r"embedding|position|attention_\w+|mlp_\w+|cross_\w+|relative_bias|vit_norm|projection|\w+_bias|norm|output"
    return re.match(rf"({units})\.({inner})(\.|$)", name) is not None


def _vit_sizes(own: Stored) -> dict[str, Any]:
    width, pixels = own["patches.embedding.weight"].shape
    return {
        "width": width,
        "depth": _count(own, "vit_block_"),
        "mlp_dim": own["vit_block_0.mlp_in.hidden.weight"].shape[0],
        "patch_size": math.isqrt(pixels // 3),
    }


def _mt5_sizes(own: Stored) -> dict[str, Any]:
    (vocab_size, d_model), per_layer = own["bridge.embedding.weight"].shape, "bridge.encoder_bias.weight" not in own
    bias = own["encoder_block_0.relative_bias.weight" if per_layer else "bridge.encoder_bias.weight"]
    return {
        "d_model": d_model,
        "d_ff": own["encoder_block_0.mlp_in.gate.weight"].shape[0],
        "d_kv": own["encoder_block_0.attention_in.query.weight"].shape[0] // bias.shape[1],
        "num_heads": bias.shape[1],
        "vocab_size": vocab_size,
        "relative_attention_num_buckets": bias.shape[0],
        "num_encoder_layers": _count(own, "encoder_block_"),
        "num_decoder_layers": _count(own, "decoder_block_"),
        "bias_per_layer": per_layer,
    }


def _count(own: Stored, prefix: str) -> int:
    return len({name.split(".")[0] for name in own if name.startswith(prefix)})


def read_tower_config(path: Path, tower: str, where: str) -> dict[str, Any] | None:
    """Return the part of a folder's config.json that describes the tower, None for a file or a folder without one."""
    config = read_config_json(path, where)
    if config is None:
        return None
    kind = config["model_type"]
    if kind == EXPORT:
        return part(config, "text_config" if tower == "mt5" else "vision_config", where) | {"part_of": EXPORT}
    if tower == "vit" and kind == "siglip":
        return part(config, "vision_config", where)
    if kind not in (mt5.NAMES if tower == "mt5" else ("siglip_vision_model",)):
        naflex = " (NaFlex, whose images have other shapes)" if kind == "siglip2" else ""
        raise ConfigurationError(f"{where} is a folder of model_type={kind}{naflex}; give {WANTED[tower]}.")
    return config
