"""Who is slowest, and when it is said."""

import pytest

from train.config import StragglerConfig
from train.rank_times import RankTimes, Stragglers, summary

EVEN = RankTimes(step_s=1.0, communication_wait_s=0.6, data_wait_s=0.1)
SLOW = RankTimes(step_s=1.0, communication_wait_s=0.1, data_wait_s=0.3)


def test_the_slowest_rank_is_the_one_that_waits_least_for_others() -> None:
    found = summary([EVEN, SLOW, EVEN])
    assert found["slowest_rank"] == 1
    assert found["slowest_rank_busy_s"] == pytest.approx(0.9) and found["median_rank_busy_s"] == pytest.approx(0.4)
    assert found["compute_s"] == pytest.approx(0.6) and found["communication_wait_s"] == 0.6
    assert summary([]) == {}


def test_a_straggler_is_told_of_once_a_window() -> None:
    stragglers = Stragglers(StragglerConfig(factor=2.0, window=3))
    said = [stragglers.judge([EVEN, SLOW]) for _ in range(6)]
    assert [bool(text) for text in said] == [False, False, True, False, False, True]
    assert said[2] is not None and said[2].startswith(
        "Rank 1 is slow: its own work takes 0.9 s a step (0.3 s of it waiting for data), 2.2 times"
    )


def test_one_slow_step_is_no_straggler() -> None:
    stragglers = Stragglers(StragglerConfig(factor=2.0, window=4))
    assert not any(stragglers.judge([EVEN, SLOW if step == 2 else EVEN]) for step in range(8))
    never = Stragglers(StragglerConfig(factor=0.0, window=1))
    assert never.judge([EVEN, SLOW]) is None
