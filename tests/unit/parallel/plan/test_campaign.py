"""A whole run costs more the more devices break, and its interval of checkpoints is the best."""

from dataclasses import replace

import pytest

from parallel.plan.campaign import DAY_S, Disturbance, simulate

WEEK = 7 * DAY_S


def test_interruptions_are_those_of_the_published_cluster() -> None:
    week = simulate(WEEK, 1024, 8, 1275, 1e9)
    assert week.interruptions == pytest.approx(3.4, rel=0.05)  # 49.5 h between interruptions of 1,024 devices
    assert 7 < week.expected_days < week.days_90 < 7.3
    assert week.energy_mwh == pytest.approx(week.device_days * 24 * 1275e-6)
    assert week.spare_nodes == 3


def test_no_other_interval_loses_less() -> None:
    week, between, save = simulate(WEEK, 4096, 8, 1275, 50e9), Disturbance().device_hours * 3600 / 4096, 5.0

    def lost(interval: float) -> float:
        return save / interval + interval / 2 / between

    assert all(lost(week.interval_s) <= lost(factor * week.interval_s) for factor in (0.5, 0.9, 1.1, 2.0))


def test_more_devices_larger_states_and_slower_restarts_cost_more() -> None:
    base = simulate(WEEK, 1024, 8, 1275, 10e9).expected_days
    assert simulate(WEEK, 4096, 8, 1275, 10e9).expected_days > base
    assert simulate(WEEK, 1024, 8, 1275, 40e9).expected_days > base
    slow = replace(Disturbance(), restart_s=3600)
    assert simulate(WEEK, 1024, 8, 1275, 10e9, slow).expected_days > base
