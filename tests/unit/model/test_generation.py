"""When greedy search ends: at EOS in each row, and on every rank at the step at which the last rank ends."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.generation import EOS, Decoder, generate
from tests.unit.model.examples import example, micro_batch, small_model

REDUCE = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.SUM: torch.add}


class Scripted(Decoder):
    """Gives written tokens [steps, B], and keeps what it was given."""

    def __init__(self, steps: list[list[int]]) -> None:
        self.steps, self.given = iter(steps), []

    def start(self) -> None:
        pass

    def next(self, token: Tensor) -> Tensor:
        self.given.append(token.squeeze(1).tolist())
        return torch.tensor(next(self.steps))


class OtherRank:
    """A group of two: after each step of this rank, whether a row of the other one still runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, running: list[int]) -> None:
        self.running = iter(running)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def size(self) -> int:
        return 2

    def all_reduce(self, x: Tensor, op: Any, group: Any) -> None:
        assert group is self
        x.copy_(REDUCE[op](x, torch.tensor(next(self.running), dtype=x.dtype)))


def answers(steps: list[list[int]], most: int, together: Any = None) -> tuple[list[list[int]], list[list[int]]]:
    """(answers by row, tokens that the decoder was given step by step)."""
    batch = micro_batch([[example(row)] for row in range(len(steps[0]))])
    decoder = Scripted(steps)
    return generate(small_model(), batch, most, together, decoder).tolist(), decoder.given


def test_a_row_that_has_ended_is_padded_and_all_end_with_the_last() -> None:
    found, given = answers([[5, 7], [EOS, 8], [9, EOS], [9, 9]], most=4)
    assert found == [[5, EOS, 0], [7, 8, EOS]]
    assert given == [[0, 0], [5, 7], [EOS, 8]]


def test_no_more_tokens_than_asked_for() -> None:
    assert answers([[5], [6], [7]], most=2)[0] == [[5, 6]]


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([1, 1, 1, 0], [[5, EOS, 0, 0]]),  # the other rank ends two steps later
        ([0, 0, 0, 0], [[5, EOS]]),  # it has ended before
    ],
)
def test_ranks_that_share_parameters_end_together(
    running: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = OtherRank(monkeypatch, running)
    assert answers([[5], [EOS], [9], [9], [9]], most=5, together=group)[0] == expected
