"""The slowest rank is found from the times of all ranks, and reported once a window."""

import pytest
import torch

from train.config import StragglerConfig
from train.health.stragglers import Stragglers, summary
from train.step.reduction import no_times

EVEN = (1.0, 0.6, 0.1)  # seconds: all of the step, waiting for others, waiting for data
SLOW = (1.0, 0.1, 0.3)


def times(*ranks: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor(ranks, dtype=torch.float64)


def test_the_slowest_rank_is_the_one_that_waits_least_for_others() -> None:
    found = summary(times(EVEN, SLOW, EVEN))
    assert found["slowest_rank"] == 1
    assert found["slowest_rank_busy_s"] == pytest.approx(0.9) and found["median_rank_busy_s"] == pytest.approx(0.4)
    assert found["compute_s"] == pytest.approx(0.6) and found["communication_wait_s"] == 0.6
    assert summary(no_times()) == {}


def test_a_straggler_is_reported_once_a_window() -> None:
    stragglers = Stragglers(StragglerConfig(factor=2.0, window=3))
    reports = [stragglers.judge(times(EVEN, SLOW)) for _ in range(6)]
    assert [bool(text) for text in reports] == [False, False, True, False, False, True]
    assert reports[2] is not None and reports[2].startswith(
        "Rank 1 is slow: its own work takes 0.9 s a step (0.3 s of it waiting for data), 2.2 times"
    )


def test_one_slow_step_is_no_straggler() -> None:
    stragglers = Stragglers(StragglerConfig(factor=2.0, window=4))
    assert not any(stragglers.judge(times(EVEN, SLOW if step == 2 else EVEN)) for step in range(8))
    never = Stragglers(StragglerConfig(factor=0.0, window=1))
    assert never.judge(times(EVEN, SLOW)) is None


def test_a_thousand_ranks_are_judged_without_an_object_for_each() -> None:
    """By value: the slowest of 1,024, the lower of the two medians, sums kept as one tensor."""
    ranks = torch.tensor([[2.0, 1.0, 0.5]] * 1024, dtype=torch.float64)
    ranks[700] = torch.tensor([2.0, 0.0, 0.25])
    found = summary(ranks)
    assert (found["slowest_rank"], found["slowest_rank_busy_s"], found["median_rank_busy_s"]) == (700, 2.0, 1.0)
    assert (found["step_s"], found["communication_wait_s"], found["compute_s"]) == (2.0, 1.0, 1.75)
    stragglers = Stragglers(StragglerConfig(factor=1.5, window=1))
    assert str(stragglers.judge(ranks)).startswith("Rank 700 is slow") and stragglers.sums.shape == (2, 1024)


def test_a_rank_beside_others_that_only_wait_is_slow() -> None:
    stragglers = Stragglers(StragglerConfig(factor=2.0, window=1))
    report = stragglers.judge(times((1.0, 1.0, 0.0), (1.0, 1.5, 0.0), (1.0, 0.0, 0.0)))
    assert report is not None and report.startswith("Rank 2 is slow: its own work takes 1 s a step")
