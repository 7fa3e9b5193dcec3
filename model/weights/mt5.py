"""Hugging Face `transformers` classes MT5, UMT5 and T5 (version 1.1, Flan), ForConditionalGeneration."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from common.errors import ConfigurationError
from model.config import MT5Config
from model.weights.config_json import whole_number
from model.weights.stored import Stored
from model.weights.table import ForeignTensor, Table

NAMES = {"mt5": "mT5", "umt5": "umT5", "t5": "T5"}
# What a config.json may leave out: the defaults of transformers' configuration classes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mt5": {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"},
    "t5": {"vocab_size": 32128, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu"},
}
DEFAULTS["umt5"] = DEFAULTS["mt5"]
OF_ALL = {"d_model": 512, "d_kv": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}

# Copies of tensors that the table has.
COPIES = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "*.EncDecAttention.relative_attention_bias.weight",
)


def mt5_table(mt5: MT5Config, output_scale: float = 1.0) -> Table:
    """Return the table of an mT5 of this size; `output_scale`: see the function."""
    names = {
        "bridge.embedding.weight": "shared.weight",
        "encoder_norm.norm.weight": "encoder.final_layer_norm.weight",
        "head.norm.weight": "decoder.final_layer_norm.weight",
        "head.output.weight": "lm_head.weight",
    }
    for stack, layers in (("encoder", mt5.num_encoder_layers), ("decoder", mt5.num_decoder_layers)):
        bias = "SelfAttention.relative_attention_bias.weight"
        if not mt5.bias_per_layer:
            names[f"bridge.{stack}_bias.weight"] = f"{stack}.block.0.layer.0.{bias}"
        for i in range(layers):
            ours, theirs = f"{stack}_block_{i}", f"{stack}.block.{i}.layer"
            if mt5.bias_per_layer:
                names[f"{ours}.relative_bias.weight"] = f"{theirs}.0.{bias}"
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
    scales = {"head.output.weight": output_scale}
    return Table(
        {ours: ForeignTensor(theirs, scale=scales.get(ours, 1.0)) for ours, theirs in names.items()},
        ignored=COPIES,
        tied={"lm_head.weight": "shared.weight"},  # transformers 5 ties the two and saves one
    )


def sizes_from_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of `MT5Config` that a config.json of transformers gives.

    Raises ConfigurationError for a model that this one cannot compute.
    """
    kind = str(config["model_type"])
    given: dict[str, Any] = OF_ALL | DEFAULTS[kind] | {key: value for key, value in config.items() if value is not None}
    activation = (given["feed_forward_proj"], given.get("dense_act_fn", "gelu_new"))
    if activation[0] == "relu" and kind == "t5":
        raise ConfigurationError(
            f"{where} is a T5 of version 1.0 (feed_forward_proj=relu), whose MLP is another; give T5 1.1, Flan-T5, mT5 "
            "or umT5."
        )
    if activation[0] not in ("gated-gelu", "gated-gelu_new") or activation[1] != "gelu_new":
        raise ConfigurationError(
            f"{where} has feed_forward_proj={activation[0]} ({activation[1]}), here it is gated-gelu (gelu_new); give "
            "a model with that."
        )
    if (epsilon := given.get("layer_norm_epsilon", 1e-6)) != 1e-6:
        raise ConfigurationError(f"{where} has layer_norm_epsilon={epsilon}, here it is 1e-6; give a model with that.")
    names = ("d_model", "d_ff", "d_kv", "num_heads", "vocab_size", *list(OF_ALL)[2:])
    layers = whole_number(given, "num_layers", None, where)
    return {
        **{name: whole_number(given, name, None, where) for name in names},
        "num_encoder_layers": layers,
        "num_decoder_layers": whole_number(given, "num_decoder_layers", layers, where),
        "bias_per_layer": bool(given.get("bias_per_layer", kind == "umt5")),
    }


def sizes_from_tensors(stored: Stored) -> dict[str, Any]:
    """Return the fields of `MT5Config` that the shapes of transformers' tensors give: all but the largest distance."""
    first = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = stored[f"{first}.relative_attention_bias.weight"].shape
    vocab_size, d_model = stored["shared.weight"].shape
    return {
        "d_model": d_model,
        "d_ff": stored["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "d_kv": stored[f"{first}.q.weight"].shape[0] // heads,
        "num_heads": heads,
        "vocab_size": vocab_size,
        "relative_attention_num_buckets": buckets,
        "num_encoder_layers": _layers(stored, "encoder"),
        "num_decoder_layers": _layers(stored, "decoder"),
        "bias_per_layer": f"{first}.relative_attention_bias.weight".replace("block.0", "block.1") in stored,
    }


def output_scale(config: Mapping[str, Any], names: Collection[str]) -> float:
    """Return the factor on the output matrix by which our unscaled logits equal transformers'.

    T5 scales the decoder's output by d_model^-0.5 unless config.json has `tie_word_embeddings: false`, as T5 1.1 and
    Flan-T5 have. umT5 does so where the output matrix is the embedding; the published ones have a matrix of their own,
    and T5X, which trained them, scales nothing. transformers 5 scales umT5's logits always. mT5's are never scaled.
    """
    kind, d_model = config.get("model_type"), int(config.get("d_model", OF_ALL["d_model"]))
    scaled = kind == "t5" and config.get("scale_decoder_outputs", config.get("tie_word_embeddings")) is not False
    scaled |= kind == "umt5" and "lm_head.weight" not in names
    return d_model**-0.5 if scaled else 1.0


def _layers(names: Collection[str], stack: str) -> int:
    found = (re.match(rf"{stack}\.block\.(\d+)\.", name) for name in names)
    return 1 + max((int(each[1]) for each in found if each), default=-1)
