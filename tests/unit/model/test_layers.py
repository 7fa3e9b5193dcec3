"""Initial values, and which stored tensors fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from model import layers
from tests.unit.model.examples import small_model


def test_a_truncated_normal_is_drawn_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary's matrix would else take several times its own memory while it is filled."""
    sizes: list[int] = []
    draw = nn.init.trunc_normal_

    def watched(x: torch.Tensor, *arguments: float, **options: torch.Generator) -> torch.Tensor:
        sizes.append(x.numel())
        return draw(x, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.init, "trunc_normal_", watched)
    monkeypatch.setattr(layers, "AT_ONCE", 6400)
    x = torch.full((1000, 64), torch.nan)
    layers.fan_in_truncated(x, torch.Generator().manual_seed(0))
    assert max(sizes) == 6400 and sum(sizes) == x.numel()
    deviation = 64**-0.5  # flax's: of unit variance after the cut at two standard deviations
    assert x.std().item() == pytest.approx(deviation, rel=0.01)
    assert x.abs().max().item() <= 2 * deviation / 0.8796


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((16, 24), True),
        ((25, 24), True),  # a square of another resolution
        ((25, 32), False),
        ((24, 24), False),
        ((25,), False),
        ((25, 24, 1), False),
        ((0, 24), False),
        ((), False),
        (None, False),
    ],
)
def test_only_squares_of_the_same_width_can_be_resampled(shape: tuple[int, ...] | None, fits: bool) -> None:
    stored = None if shape is None else torch.Size(shape)
    ((_, position),) = [each for each in layers.parameter_parts(small_model().patches) if each[1].resample]
    assert position.shape == (16, 24) and position.fits(stored) is fits
    assert replace(position, resample=None).fits(stored) is (shape == (16, 24))
