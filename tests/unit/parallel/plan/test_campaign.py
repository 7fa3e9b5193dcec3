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


def test_a_run_by_hand() -> None:
    """100 devices break every 100 x 36 s = 1 h; a save of 50 s pays every 600 s, and costs a twelfth of the time.

    An interruption takes a restart of 60 s and half of an interval, 360 s: a tenth of the time between two.
    """
    broken = Disturbance(device_hours=100.0, restart_s=60.0, repair_h=2.0, copy_gb_per_s=2.0)
    run = simulate(10_800.0, 100, 4, 500.0, 100e9, broken)
    expected = 10_800 * (1 + 50 / 600) / 0.9
    assert run.training_days == pytest.approx(10_800 / 86_400)
    assert run.interval_s == pytest.approx(600) and run.expected_days == pytest.approx(expected / 86_400)
    assert run.interruptions == pytest.approx(expected / 3600) == pytest.approx(3.6111, rel=1e-4)
    assert run.days_90 == pytest.approx((expected + 1.2816 * 3.6111**0.5 * 360) / 86_400, rel=1e-4)
    assert run.device_days == pytest.approx(100 * expected / 86_400)
    assert run.energy_mwh == pytest.approx(expected / 3600 * 100 * 500 / 1e6)
    # 25 nodes break every 25 h each and are back after 2 h: two are out, and 2 + 2.3263 x sqrt(2) = 5.3 at most.
    assert run.spare_nodes == 6


def test_a_run_that_breaks_all_the_time_is_long_but_finite_and_a_save_takes_a_while() -> None:
    hopeless = simulate(100.0, 100, 4, 1.0, 0.0, Disturbance(device_hours=1.0, restart_s=3600.0))
    saving = 1 + 0.1 / (2 * 0.1 * 36) ** 0.5
    assert hopeless.expected_days * DAY_S == pytest.approx(100 * saving / 0.05)
    assert hopeless.interval_s == pytest.approx((2 * 0.1 * 36) ** 0.5)


def test_defaults_of_interruptions() -> None:
    """Llama 3: 419 in 54 days of 16,384 H100; the other numbers are estimates."""
    assert Disturbance() == Disturbance(16_384 * 54 * 24 / 419, 600.0, 24.0, 10.0)
    assert simulate(1e6, 8, 8, 1.0, 1e9) == simulate(1e6, 8, 8, 1.0, 1e9, Disturbance())
    assert DAY_S == 24 * 3600
