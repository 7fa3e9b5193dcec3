"""Initial values."""

import pytest
import torch
from torch import Generator, Tensor, nn

from model import initializers
from model.initializers import draw_block

KINDS = {
    "normal": initializers.normal(0.3),
    "xavier": initializers.xavier_uniform,
    "fan_in": initializers.fan_in_normal,
    "truncated": initializers.fan_in_truncated,
}


def whole(kind: str, rows: int, columns: int) -> Tensor:
    found, shape = torch.empty(rows, columns), torch.Size((rows, columns))
    KINDS[kind](found, Generator().manual_seed(3), shape)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1000, 64), (777, 7), (16, 5), (33, 1), (3, 4000)])
def test_a_block_has_the_values_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, columns: int
) -> None:
    monkeypatch.setattr(initializers, "AT_ONCE", 512)
    wanted = whole(kind, rows, columns)
    for at in ((0, rows, 0, columns), (rows // 2, rows, 0, columns), (rows // 4, rows // 2, columns // 2, columns)):
        block = slice(*at[:2]), slice(*at[2:])
        found = draw_block(KINDS[kind], wanted.shape, block, Generator().manual_seed(3))
        assert torch.equal(found, wanted[block]), at


@pytest.mark.parametrize("kind", ["xavier", "truncated"])
def test_draws_are_those_of_torch(kind: str) -> None:
    wanted, generator, std = torch.empty(90, 70), Generator().manual_seed(3), 70**-0.5 / 0.87962566103423978
    if kind == "xavier":
        nn.init.xavier_uniform_(wanted, generator=generator)
    else:
        nn.init.trunc_normal_(wanted, 0.0, std, -2 * std, 2 * std, generator=generator)
    assert torch.equal(whole(kind, 90, 70), wanted)


def test_a_large_tensor_is_drawn_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary's matrix would else take several times its own memory while it is filled."""
    sizes: list[int] = []

    def watched(x: Tensor, generator: Generator, shape: torch.Size) -> None:
        sizes.append(x.numel())
        initializers.fan_in_truncated(x, generator, shape)

    monkeypatch.setattr(initializers, "AT_ONCE", 6400)
    x = draw_block(watched, torch.Size((1000, 64)), (slice(0, 1000), slice(0, 64)), Generator().manual_seed(0))
    assert max(sizes) <= 6400 + 16 * 64 and sum(sizes) == x.numel()
    deviation = 64**-0.5  # flax's: of unit variance after the cut at two standard deviations
    assert x.std().item() == pytest.approx(deviation, rel=0.01)
    assert x.abs().max().item() <= 2 * deviation / 0.8796
    sizes.clear()
    draw_block(watched, torch.Size((1000, 64)), (slice(500, 750), slice(0, 64)), Generator().manual_seed(0))
    assert sum(sizes) <= 250 * 64 + 2 * 6400  # rows before the block are skipped, those after it not drawn
