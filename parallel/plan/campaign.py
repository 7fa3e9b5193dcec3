"""Simulate a whole run: checkpoints, interruptions, restarts and validation, as days, device-days and energy.

Interruptions come at random, at a constant rate for each device. A checkpoint after every interval loses half of an
interval for each interruption; Young (1974) gives the interval that loses least, sqrt(2 x cost of a save x mean time
between interruptions).
"""

from dataclasses import dataclass
from math import ceil, sqrt

# Llama 3 (2024), section 3.3.4: 419 unplanned interruptions in 54 days of 16,384 H100.
DEVICE_HOURS_BETWEEN_INTERRUPTIONS = 16_384 * 54 * 24 / 419
QUANTILE_90, QUANTILE_99 = 1.2816, 2.3263  # of the normal distribution
DAY_S = 86_400


@dataclass(frozen=True)
class Disturbance:
    """Hold the causes of interruptions of a run, and their cost."""

    device_hours: float = DEVICE_HOURS_BETWEEN_INTERRUPTIONS
    """Mean hours of one device between interruptions."""
    restart_s: float = 600.0
    """From an interruption to the next step: detection, a new job, loading. Estimate; parallel.timeout_s bounds it."""
    repair_h: float = 24.0
    """Hours until a broken node is back; estimate."""
    copy_gb_per_s: float = 10.0
    """Rate of a device's copy to the host, which training waits for; writing goes on beside it. Estimate."""


@dataclass(frozen=True)
class Campaign:
    """Hold a whole run: expected length, the length that 90 % of runs stay below, and what it takes."""

    training_days: float
    expected_days: float
    days_90: float
    interval_s: float
    """Best seconds between checkpoints."""
    interruptions: float
    device_days: float
    energy_mwh: float
    spare_nodes: int
    """Nodes to hold ready so that in 99 % of all moments every broken one is replaced."""


def simulate(
    training_s: float,
    devices: int,
    devices_per_node: int,
    power_w: float,
    state_bytes: float,
    disturbance: Disturbance | None = None,
) -> Campaign:
    """Return the length and the cost of a run of `training_s` seconds without interruptions.

    `state_bytes`: what one device copies for a checkpoint.
    """
    d = disturbance or Disturbance()
    between_s = d.device_hours * 3600 / devices
    save_s = max(state_bytes / (d.copy_gb_per_s * 1e9), 0.1)
    interval_s = sqrt(2 * save_s * between_s)
    lost_s = d.restart_s + interval_s / 2
    saving = 1 + save_s / interval_s
    expected_s = training_s * saving / (1 - min(lost_s / between_s, 0.95))
    interruptions = expected_s / between_s
    slow_s = expected_s + QUANTILE_90 * sqrt(interruptions) * lost_s
    out = devices / devices_per_node * d.repair_h / (d.device_hours / devices_per_node)
    return Campaign(
        training_days=training_s / DAY_S,
        expected_days=expected_s / DAY_S,
        days_90=slow_s / DAY_S,
        interval_s=interval_s,
        interruptions=interruptions,
        device_days=expected_s / DAY_S * devices,
        energy_mwh=expected_s / 3600 * devices * power_w / 1e6,
        spare_nodes=ceil(out + QUANTILE_99 * sqrt(out)),
    )
