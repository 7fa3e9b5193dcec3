"""Attribute the seconds of a step to computing and waiting, and find the ranks that are slow step after step."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from train.config import StragglerConfig

RESOLUTION_S = 1e-6  # of the times that ranks exchange; a rank that only waits may have 0 -> avoids division by 0


@dataclass(frozen=True)
class RankTimes:
    """The seconds of one step on one rank: all of it, waiting for other ranks, waiting for data; the rest is compute.

    The times of all ranks are a tensor, float64 [ranks, 3] with these fields as columns, because an object for each of
    a thousand ranks would cost milliseconds in every step.
    """

    step_s: float = 0.0
    communication_wait_s: float = 0.0
    data_wait_s: float = 0.0


def compute_s(times: Tensor) -> Tensor:
    """Return the seconds that each rank computed, [ranks]."""
    step, communication_wait, data_wait = times.unbind(1)
    return (step - communication_wait - data_wait).clamp(min=0)


def busy_s(times: Tensor) -> Tensor:
    """Return the seconds that the step would take each rank if it waited for no other, [ranks]."""
    return (times[:, 0] - times[:, 1]).clamp(min=0)


def summary(times: Tensor) -> dict[str, Any]:
    """Return the metrics of a step: maxima over ranks, and the rank whose own work takes longest; {} without times."""
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
        "median_rank_busy_s": float(busy.median()),  # the lower one of two in the middle
    }


class Stragglers:
    """Find a rank whose own work takes `factor` times the median of all ranks, on average over `window` steps.

    Every rank judges the same times. The median of two ranks is the faster one. A straggler is reported once a window.
    """

    def __init__(self, config: StragglerConfig) -> None:
        self.config = config
        self.steps, self.sums = 0, Tensor()  # [2, ranks]: seconds (busy, waiting for data) in this window

    def judge(self, times: Tensor) -> str | None:
        """Add the times of a step; return a sentence that names a straggler, or None."""
        if len(times) < 2 or not self.config.factor:
            return None
        seconds = busy_s(times), times[:, 2]
        if self.steps == 0:
            self.sums = times.new_zeros(len(seconds), len(times))
        self.steps += 1
        for total, each in zip(self.sums, seconds, strict=True):
            total += each
        if self.steps < self.config.window:
            return None
        (busy, data_wait), self.steps = self.sums / self.config.window, 0
        median, rank = max(RESOLUTION_S, float(busy.median())), int(busy.argmax())
        slowest, data = float(busy[rank]), float(data_wait[rank])
        if slowest <= self.config.factor * median:
            return None
        return (
            f"Rank {rank} is slow: its own work takes {slowest:.3g} s a step ({data:.3g} s of it waiting for data), "
            f"{slowest / median:.1f} times the median of all ranks ({median:.3g} s), on average over "
            f"{self.config.window} steps."
        )
