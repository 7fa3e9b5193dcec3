"""The learning rates of the paper."""

import pytest

from train.config import ScheduleConfig
from train.schedule import learning_rate

PAPER_STEPS = 382_325  # 1566 M examples in batches of 4096


def test_the_papers_reciprocal_square_root() -> None:
    schedule = ScheduleConfig(name="rsqrt", peak=1e-2, warmup_steps=1000)
    assert learning_rate(schedule, 1, PAPER_STEPS) == pytest.approx(1e-5)
    assert learning_rate(schedule, 500, PAPER_STEPS) == pytest.approx(5e-3)
    assert learning_rate(schedule, 1000, PAPER_STEPS) == pytest.approx(1e-2)
    assert learning_rate(schedule, 4000, PAPER_STEPS) == pytest.approx(5e-3)
    assert learning_rate(schedule, PAPER_STEPS, PAPER_STEPS) == pytest.approx(5.1e-4, rel=5e-3)


def test_linear_decay_ends_at_zero() -> None:
    schedule = ScheduleConfig(name="linear_decay", peak=1e-4, warmup_steps=0)
    assert [learning_rate(schedule, step, 100) for step in (50, 75, 100)] == pytest.approx([5e-5, 2.5e-5, 0.0])


def test_cosine_ends_at_its_fraction() -> None:
    schedule = ScheduleConfig(name="cosine", peak=1.0, warmup_steps=10, end_fraction=0.1)
    assert [learning_rate(schedule, step, 110) for step in (10, 60, 110)] == pytest.approx([1.0, 0.55, 0.1])


def test_cooldown_is_a_line_to_zero() -> None:
    schedule = ScheduleConfig(name="constant", peak=1.0, warmup_steps=0, cooldown_steps=10)
    assert [learning_rate(schedule, step, 100) for step in (90, 95, 100)] == pytest.approx([1.0, 0.5, 0.0])
