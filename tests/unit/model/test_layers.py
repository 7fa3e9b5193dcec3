"""Which stored tensors fit."""

from dataclasses import replace

import pytest
import torch

from model import layers
from tests.unit.model.examples import small_model


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
