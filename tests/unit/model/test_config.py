"""Sizes and choices of the model: the bounds of each, and what follows from them."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from common.command_line import CONF
from common.errors import ConfigurationError
from model.config import ModelConfig, MT5Config, ViTConfig


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((ViTConfig, name) for name in ("width", "depth", "mlp_dim", "num_heads", "patch_size")),
        *((MT5Config, name) for name, value in vars(MT5Config()).items() if not isinstance(value, bool)),
        *((ModelConfig, name) for name in ("image_size", "loss_chunk")),
    ],
)
def test_sizes_begin_at_one(kind: type, name: str) -> None:
    rest = {"num_heads": 1} if kind is ViTConfig and name == "width" else {}
    assert getattr(kind(**rest, **{name: 1}), name) == 1
    for value in (0, -1):
        with pytest.raises(ConfigurationError, match=rf"{name}={value} must be at least 1"):
            kind(**rest, **{name: value})


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("dropout_rate", [0.0, 0.1, 0.999], [-0.001, 1.0]),
        ("z_loss", [0.0, 1e-4], [-1e-9]),
        ("attention", ["auto", "plain", "sdpa", "flex"], ["fused", ""]),
        ("loss_reduction", ["mean", "sum"], ["none"]),
    ],
)
def test_choices(name: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        assert getattr(ModelConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ConfigurationError, match=name):
            ModelConfig(**{name: value})


def test_heads_divide_the_width_of_the_vit_and_need_not_that_of_the_mt5() -> None:
    with pytest.raises(ConfigurationError, match=r"vit\.width=128 must be a multiple of vit\.num_heads=3"):
        ViTConfig(width=128, num_heads=3)
    assert MT5Config(d_model=512, num_heads=6, d_kv=64).inner == 384


def test_visual_tokens_are_whole_patches() -> None:
    assert [ViTConfig(patch_size=14).num_tokens(size) for size in (224, 237, 238, 588)] == [256, 256, 289, 1764]


def test_defaults_of_the_towers_are_the_toys() -> None:
    for kind, file, others in ((ViTConfig, "vit", {}), (MT5Config, "mt5", {"vocab_size": 250112})):
        toy = OmegaConf.to_container(OmegaConf.load(CONF / file / "mini.yaml"))
        assert isinstance(toy, dict) and vars(kind()).items() >= (toy | others).items()


def test_defaults_are_t5xs_and_the_papers() -> None:
    model = ModelConfig()
    assert (model.image_size, model.dropout_rate, model.z_loss, model.loss_reduction) == (224, 0.0, 1e-4, "mean")
    mt5 = MT5Config()
    assert mt5.vocab_size == 250112
    assert (mt5.relative_attention_num_buckets, mt5.relative_attention_max_distance) == (32, 128)


@pytest.mark.parametrize(
    ("kind", "name", "most"),
    [
        *((ViTConfig, name, 2**20) for name in ("width", "mlp_dim", "patch_size")),
        (ViTConfig, "depth", 1_000),
        *((MT5Config, name, 2**20) for name in ("d_model", "d_ff", "d_kv", "num_heads")),
        *((MT5Config, name, 1_000) for name in ("num_encoder_layers", "num_decoder_layers")),
        (MT5Config, "vocab_size", 2**24),
    ],
)
def test_sizes_end_where_a_check_would_take_hours(kind: type, name: str, most: int) -> None:
    assert getattr(kind(**{name: most}), name) == most
    with pytest.raises(ConfigurationError, match=rf"{name}={4 * most} must be at most {most}"):
        kind(**{name: 4 * most})
