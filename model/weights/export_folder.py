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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.files import write_text
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_parts
from model.pali import local_block
from model.weights.files import write_tensors
from model.weights.mt5 import mt5_table
from model.weights.siglip import siglip_table
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
class Exported:
    """The shape and type of a tensor that can be exported."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.shape.numel() * self.dtype.itemsize


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


def read_config(folder: Path) -> PaLIConfig:
    """Return the sizes of an exported model; raise ConfigurationError for a folder that holds none."""
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, vision = plain["text_config"], plain["vision_config"]
        mt5 = MT5Config(
            num_encoder_layers=text["num_layers"],
            bias_per_layer=text["model_type"] == "umt5",
            **{name: text[name] for name in vars(MT5Config()) if name not in NOT_SIZES},
        )
        vit = ViTConfig(
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            mlp_dim=vision["intermediate_size"],
            num_heads=vision["num_attention_heads"],
            patch_size=vision["patch_size"],
        )
        return PaLIConfig(vit, mt5, ModelConfig(image_size=vision["image_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{folder} holds no exported model (config.json: {type(error).__name__} {error}); export one by "
            "python -m train.export."
        ) from error


def write_weights(
    folder: Path,
    config: PaLIConfig,
    family: str,
    stored: Mapping[str, Exported],
    load: Callable[[Sequence[str]], Mapping[str, Tensor]],
    max_shard_bytes: int,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write the weights and every config.json, one file after another; memory holds one file's tensors.

    `family`: one of `fitting_families`. `load` returns tensors by logical name. Both matrices of vocabulary are always
    written, because transformers 5 ties them unless a folder holds both. Raises ConfigurationError if one is missing.
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
            loaded = load(list(shard.tensors))
            written = {x.name: x.write(loaded[ours]).contiguous() for ours, x in shard.tensors.items()}
            write_tensors(written, folder / shard.file)
            total += sum(tensor.nbytes for tensor in written.values())
            own |= dict.fromkeys(written, Path(shard.file).name)
            weight_map |= dict.fromkeys(written, shard.file)
        if len(set(own.values())) > 1:
            _write_index(
                folder / sub / INDEX, own, sum(stored[n].shape.numel() * stored[n].dtype.itemsize for n in table)
            )
    _write_index(folder / INDEX, weight_map, total)
    _write_configs(folder, config, family, stored)


def load_weights(folder: Path, module: nn.Module, config: PaLIConfig) -> None:
    """Fill the parameters of a model in one process from an export, tensor by tensor.

    Raises ConfigurationError for a file that is missing or damaged, and for a tensor that does not fit.
    """
    places = {name: (parameter, part) for parameter, part in parameter_parts(module) for name in [part.name]}
    foreign = {ours: x for table in tables(config).values() for ours, x in table.items()}
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for ours, tensor in foreign.items():
            by_file.setdefault(weight_map[tensor.name], []).append(ours)
        for file, names in by_file.items():
            with safe_open(str(folder / file), framework="pt") as opened:
                for ours in names:
                    parameter, part = places[ours]
                    value = foreign[ours].read(opened.get_tensor(foreign[ours].name))
                    if value.shape != part.shape:
                        raise ConfigurationError(
                            f"{folder / file} holds {ours} as {tuple(value.shape)}, and config.json makes it "
                            f"{tuple(part.shape)}; export the model again."
                        )
                    with torch.no_grad():
                        local_block(parameter, part).copy_(value)
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigurationError(
            f"{folder} is not a whole export ({type(error).__name__}: {error}); export the model again."
        ) from error


def _shards(
    sub: str, table: Mapping[str, ForeignTensor], stored: Mapping[str, Exported], max_shard_bytes: int
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


def _write_configs(folder: Path, config: PaLIConfig, family: str, stored: Mapping[str, Exported]) -> None:
    by_folder = {
        sub: {stored[ours].dtype for ours in table} for sub, table in tables(config).items()
    }  # mixed types load as the widest
    text = text_config(config, family) | {"dtype": _widest(by_folder[TEXT])}
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
