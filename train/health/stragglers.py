"""Attribute the seconds of a step to computing and waiting, and find the ranks that are slow step after step."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from train.config import StragglerConfig

RESOLUTION_S = 1e-6  # of times as ranks exchange them; a rank that only waits takes no time at all


@dataclass(frozen=True)
class RankTimes:
    """One rank's step, in seconds: all of it, waiting for other ranks, waiting for data; the rest is its computing.

    Those of all ranks are a tensor, float64 [ranks, 3] with these fields as columns: objects for a thousand ranks
    would cost each rank milliseconds in every step.
    """

    step_s: float = 0.0
    communication_wait_s: float = 0.0
    data_wait_s: float = 0.0


def compute_s(times: Tensor) -> Tensor:
    """Seconds of each rank's computing, [ranks]."""
    step, communication_wait, data_wait = times.unbind(1)
    return (step - communication_wait - data_wait).clamp(min=0)


def busy_s(times: Tensor) -> Tensor:
    """Seconds that a step would take each rank if no other rank were slow, [ranks]."""
    return (times[:, 0] - times[:, 1]).clamp(min=0)


def summary(times: Tensor) -> dict[str, Any]:
    """For the line of metrics: the longest of each over all ranks, and which rank's own work takes longest."""
    if not len(times):
        return {}
    busy = busy_s(times)
    slowest = int(busy.argmax())
    step, communication_wait, _ = times.amax(0).tolist()
    return {
        "step_s": step,
        "compute_s": float(compute_s(times).amax()),
        "communication_wait_s": communication_wait,
        "slowest_rank": slowest,
        "slowest_rank_busy_s": float(busy[slowest]),
        "median_rank_busy_s": float(busy.median()),  # of two in the middle the smaller one
    }


class Stragglers:
    """Looks for a rank whose own work takes `factor` times the median of all ranks, on average over `window` steps.

    Every rank sees the same times. Of two ranks the faster one is the median. It is reported once per window.
    """

    def __init__(self, settings: StragglerConfig) -> None:
        self.settings = settings
        self.steps, self.sums = 0, Tensor()  # of (busy, data wait) by rank, over the steps since it was judged

    def judge(self, times: Tensor) -> str | None:
        """Return the sentence to report after a step, or None."""
        if len(times) < 2 or not self.settings.factor:
            return None
        seconds = busy_s(times), times[:, 2]
        if self.steps == 0:
            self.sums = times.new_zeros(len(seconds), len(times))
        self.steps += 1
        for total, each in zip(self.sums, seconds, strict=True):
            total += each
        if self.steps < self.settings.window:
            return None
        (busy, data_wait), self.steps = self.sums / self.settings.window, 0
        median, rank = max(RESOLUTION_S, float(busy.median())), int(busy.argmax())
        slowest, data = float(busy[rank]), float(data_wait[rank])
        if slowest <= self.settings.factor * median:
            return None
        return (
            f"Rank {rank} is slow: its own work takes {slowest:.3g} s a step ({data:.3g} s of it waiting for data), "
            f"{slowest / median:.1f} times the median of all ranks ({median:.3g} s), on average over "
            f"{self.settings.window} steps."
        )
