"""Initial values."""

import pytest
import torch
from torch import nn

from model import initializers


def test_a_truncated_normal_is_drawn_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary's matrix would else take several times its own memory while it is filled."""
    sizes: list[int] = []
    draw = nn.init.trunc_normal_

    def watched(x: torch.Tensor, *arguments: float, **options: torch.Generator) -> torch.Tensor:
        sizes.append(x.numel())
        return draw(x, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.init, "trunc_normal_", watched)
    monkeypatch.setattr(initializers, "AT_ONCE", 6400)
    x = torch.full((1000, 64), torch.nan)
    initializers.fan_in_truncated(x, torch.Generator().manual_seed(0))
    assert max(sizes) == 6400 and sum(sizes) == x.numel()
    deviation = 64**-0.5  # flax's: of unit variance after the cut at two standard deviations
    assert x.std().item() == pytest.approx(deviation, rel=0.01)
    assert x.abs().max().item() <= 2 * deviation / 0.8796
