"""Define the folder of an exported model: Hugging Face folders of both towers, and the model that joins them.

    config.json, modeling_pali.py     the whole model as one class of transformers
    model.safetensors.index.json      its tensors, which lie in the files below
    projection.safetensors            the map from ViT to mT5
    text/                             (U)MT5- or T5ForConditionalGeneration: config.json, model*.safetensors, tokenizer
    vision/                           SiglipVisionModel: config.json, model*.safetensors, preprocessor_config.json
    tokenizer.model, tokenizer.json, preprocessor_config.json, generation_config.json, README.md

No tensor is stored twice: the whole model has the tensors' names of its towers' own classes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigurationError
from common.files import write_text
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.weights.config_json import whole_number
from model.weights.files import write_tensors
from model.weights.mt5 import mt5_table
from model.weights.siglip import siglip_table
from model.weights.source import VOCABULARY, open_source, read_tower_config
from model.weights.stored import Stored, StoredTensor
from model.weights.table import ForeignTensor, weight_and_bias

TEXT, VISION, INDEX, CODE = "text", "vision", "model.safetensors.index.json", "modeling_pali.py"
PAD, EOS, UNKNOWN = 0, 1, 2
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
VISION_CLASS = "SiglipVisionModel"
# Model type of transformers -> class of the text part, class of the whole (modeling_pali.py).
FAMILIES = {
    "mt5": ("MT5ForConditionalGeneration", "PaLIForConditionalGeneration"),
    "t5": ("T5ForConditionalGeneration", "PaLIT5ForConditionalGeneration"),
    "umt5": ("UMT5ForConditionalGeneration", "PaLIUMT5ForConditionalGeneration"),
}
NOT_SIZES = ("num_encoder_layers", "bias_per_layer")  # fields of MT5Config that config.json has under another name


@dataclass(frozen=True)
class Shard:
    """A file of an export: its path in the folder, and its tensors by logical name."""

    file: str
    tensors: Mapping[str, ForeignTensor]


def tables(config: PaLIConfig) -> dict[str, dict[str, ForeignTensor]]:
    """Return the tensors of each sub-folder (TEXT, VISION, "" for the projection) by logical name."""
    vision = siglip_table(config.vit).tensors
    named = {ours: ForeignTensor(f"vision_model.{x.name}", x.read, x.write) for ours, x in vision.items()}
    projection = weight_and_bias("bridge.projection", "projection")
    return {
        TEXT: dict(mt5_table(config.mt5).tensors),
        VISION: named,
        "": {ours: ForeignTensor(theirs) for ours, theirs in projection.items()},
    }


def fitting_families(config: PaLIConfig) -> tuple[str, ...]:
    """Return the families that compute as the text part does, the usual one first; mT5 and T5 1.1 compute alike."""
    return ("umt5",) if config.mt5.bias_per_layer else ("mt5", "t5")


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an exported model."""
    return (folder / "config.json").is_file() and (folder / TEXT / "config.json").is_file()


def open_export(folder: Path, key: str = "folder") -> tuple[PaLIConfig, Stored]:
    """Return the sizes and the tensors, by logical name, of an exported model; none is read.

    `key`: the setting that names the folder. Raises ConfigurationError where a file is missing or damaged.
    """
    vit, mt5 = (open_source(folder, tower, key=key) for tower in ("vit", "mt5"))
    vision = read_tower_config(folder, "vit", vit.where) or {}
    model = ModelConfig(image_size=whole_number(vision, "image_size", None, vit.where))
    tensors = {**vit.tensors, **vit.projection, **mt5.tensors}
    return PaLIConfig(ViTConfig(**vit.sizes), MT5Config(**mt5.sizes), model), tensors


def write_weights(
    folder: Path,
    config: PaLIConfig,
    family: str,
    stored: Mapping[str, StoredTensor],
    max_shard_bytes: int,
    progress: Callable[[str], None] = lambda message: None,
    vocabulary: str | None = None,
) -> None:
    """Write the weights and every config.json, one file after another; memory holds one file's tensors.

    `family`: one of `fitting_families`. `stored`: by logical name. `vocabulary`: `Tokenizer.vocabulary`, written to
    config.json so that an exchanged tokenizer is found. Both matrices of vocabulary are always written, because
    transformers 5 ties them unless a folder holds both. Raises ConfigurationError if a tensor is missing.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for sub, table in tables(config).items():
        if missing := sorted(table.keys() - stored.keys()):
            raise ConfigurationError(f"The checkpoint lacks {missing[0]} ({len(missing)} tensors in all); train anew.")
        (folder / sub).mkdir(parents=True, exist_ok=True)
        own: dict[str, str] = {}
        for shard in _shards(sub, table, stored, max_shard_bytes):
            progress(shard.file)
            written = {x.name: x.write(stored[ours].read()).contiguous() for ours, x in shard.tensors.items()}
            write_tensors(written, folder / shard.file)
            total += sum(tensor.nbytes for tensor in written.values())
            own |= dict.fromkeys(written, Path(shard.file).name)
            weight_map |= dict.fromkeys(written, shard.file)
        if len(set(own.values())) > 1:
            _write_index(folder / sub / INDEX, own, sum(stored[name].nbytes for name in table))
    _write_index(folder / INDEX, weight_map, total)
    _write_configs(folder, config, family, stored, vocabulary)


def _shards(
    sub: str, table: Mapping[str, ForeignTensor], stored: Mapping[str, StoredTensor], max_shard_bytes: int
) -> Iterator[Shard]:
    """Divide the tensors of a sub-folder into files of at most so many bytes, at least one tensor each."""
    groups: list[list[str]] = []
    size = 0
    for ours in table:
        own = stored[ours].nbytes
        if not groups or size + own > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(ours)
        size += own
    for number, names in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else "model"
        file = f"{sub}/{name}.safetensors" if sub else "projection.safetensors"
        yield Shard(file, {ours: table[ours] for ours in names})


def _write_configs(
    folder: Path, config: PaLIConfig, family: str, stored: Mapping[str, StoredTensor], vocabulary: str | None
) -> None:
    by_folder = {  # mixed types load as the widest
        sub: {dtype for ours in table if isinstance(dtype := stored[ours].dtype, torch.dtype)}
        for sub, table in tables(config).items()
    }
    text = text_config(config, family) | {"dtype": _widest(by_folder[TEXT])}
    text |= {VOCABULARY: vocabulary} if vocabulary is not None else {}
    vision = vision_config(config) | {"dtype": _widest(by_folder[VISION])}
    _, whole_class = FAMILIES[family]
    whole = {
        "model_type": "pali",
        "architectures": [whole_class],
        "auto_map": {
            "AutoConfig": "modeling_pali.PaLIConfig",
            **dict.fromkeys(("AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"), f"modeling_pali.{whole_class}"),
        },
        "dtype": _widest(set().union(*by_folder.values())),
        "is_encoder_decoder": True,
        "text_config": text,
        "vision_config": vision,
    }
    generation = {"decoder_start_token_id": PAD, "eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 64}
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.model.image_size, "width": config.model.image_size},
        "resample": 2,  # Pillow's bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    files = {
        f"{TEXT}/config.json": text,
        f"{TEXT}/generation_config.json": generation,
        f"{VISION}/config.json": vision,
        f"{VISION}/preprocessor_config.json": processor,
        "preprocessor_config.json": processor,
        "generation_config.json": generation,
        "config.json": whole,
    }
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=1) + "\n")
    shutil.copyfile(Path(__file__).with_name(CODE), folder / CODE)


def text_config(config: PaLIConfig, family: str) -> dict[str, Any]:
    """Return the text part's config.json of transformers."""
    sizes = {name: value for name, value in vars(config.mt5).items() if name not in NOT_SIZES}
    return {
        "model_type": family,
        "architectures": [FAMILIES[family][0]],
        **sizes,
        "num_layers": config.mt5.num_encoder_layers,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": config.model.dropout_rate,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        **({"scale_decoder_outputs": False} if family == "t5" else {}),
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def vision_config(config: PaLIConfig) -> dict[str, Any]:
    """Return the ViT's config.json of transformers; it has no pooling head."""
    vit = config.vit
    return {
        "model_type": "siglip_vision_model",
        "architectures": [VISION_CLASS],
        "hidden_size": vit.width,
        "intermediate_size": vit.mlp_dim,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "num_channels": 3,
        # Pixels beyond a multiple of the patch size are dropped by the convolution too.
        "image_size": config.model.image_size,
        "patch_size": vit.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def _widest(dtypes: set[torch.dtype]) -> str:
    return DTYPE_NAMES[max(dtypes, key=lambda dtype: dtype.itemsize)]


def _write_index(path: Path, weight_map: Mapping[str, str], total: int) -> None:
    content = {"metadata": {"total_size": total}, "weight_map": dict(weight_map)}
    write_text(path, json.dumps(content, indent=1) + "\n")
