"""TFLOP per training example are those of the paper: forward, and backward of trained units."""

import pytest
import torch

from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.costs import BatchShape, batch_flops
from model.pali import plan_on_meta
from train.config import RunConfig
from train.step.flops import FlopCounter, peak_tflops

VIT_G = ViTConfig(1664, 48, 8192, 16)
VIT_E = ViTConfig(1792, 56, 15360, 16)
MT5_LARGE = MT5Config(1024, 2816, 64, 16, 24, 24)
MT5_XXL = MT5Config(4096, 10240, 64, 64, 24, 24)
FROZEN = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]


@pytest.mark.parametrize(
    ("vit", "mt5", "image_size", "frozen", "printed"),
    [
        (VIT_G, MT5_LARGE, 224, FROZEN, "1.73"),
        (VIT_G, MT5_LARGE, 224, [], "3.66"),
        (VIT_E, MT5_XXL, 224, FROZEN, "12.7"),
        (VIT_E, MT5_XXL, 588, [], "107.8"),
    ],
)
def test_an_example_of_32_input_and_32_target_tokens(
    vit: ViTConfig, mt5: MT5Config, image_size: int, frozen: list[str], printed: str
) -> None:
    config = PaLIConfig(vit, mt5, ModelConfig(image_size=image_size))
    visual = config.tokens_per_image
    counted = FlopCounter(plan_on_meta(config, frozen), visual).step(2, 2, 2 * (visual + 32), 2 * 32)
    digits = len(printed.split(".")[1])
    assert counted / 2 / 1e12 == pytest.approx(float(printed), abs=0.5001 * 10**-digits)


def test_a_step_is_the_sum_of_its_units() -> None:
    """All units count, norms and the bridge too; examples of unequal length count as if all had the mean length."""
    config = RunConfig().pali
    visual = config.tokens_per_image
    counter = FlopCounter(plan_on_meta(config), visual)
    shape = BatchShape(
        images=2, vision_tokens=visual, rows=3, encoder_tokens=round(500 / 3), decoder_tokens=round(100 / 3)
    )
    assert counter.step(3, 2, 500, 100) == batch_flops(counter.plan.units(), shape)
    assert counter.step(0, 0, 0, 0) == 0.0


def test_the_peak_is_configured_or_unknown_on_a_cpu() -> None:
    config = RunConfig()
    assert peak_tflops(config, torch.device("cpu")) is None
    config.run.peak_tflops = 3.5
    assert peak_tflops(config, torch.device("cpu")) == 3.5
