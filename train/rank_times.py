"""Where the seconds of a step go, rank by rank: who is slowest, and who is slower than the others again and again."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from train.config import StragglerConfig


@dataclass(frozen=True)
class RankTimes:
    """One rank's step, in seconds: all of it, waiting for other ranks, waiting for data; the rest is its computing."""

    step_s: float = 0.0
    communication_wait_s: float = 0.0
    data_wait_s: float = 0.0

    @property
    def compute_s(self) -> float:
        return max(0.0, self.step_s - self.communication_wait_s - self.data_wait_s)

    @property
    def busy_s(self) -> float:
        """What a step would take if nobody else were slow."""
        return max(0.0, self.step_s - self.communication_wait_s)


def summary(times: Sequence[RankTimes]) -> dict[str, Any]:
    """For the line of metrics: the longest of each over all ranks, and which rank's own work takes longest."""
    if not times:
        return {}
    slowest = max(range(len(times)), key=lambda rank: times[rank].busy_s)
    return {
        "step_s": max(each.step_s for each in times),
        "compute_s": max(each.compute_s for each in times),
        "communication_wait_s": max(each.communication_wait_s for each in times),
        "slowest_rank": slowest,
        "slowest_rank_busy_s": times[slowest].busy_s,
        "median_rank_busy_s": statistics.median_low(each.busy_s for each in times),
    }


class Stragglers:
    """Looks for a rank whose own work takes `factor` times the median of all ranks, on average over `window` steps.

    Every rank sees the same times. Of two ranks the faster one is the median. Said once per window.
    """

    def __init__(self, settings: StragglerConfig) -> None:
        self.settings = settings
        self.steps, self.busy_s, self.data_wait_s = 0, [0.0], [0.0]  # sums by rank, of the steps since it was judged

    def judge(self, times: Sequence[RankTimes]) -> str | None:
        """The sentence to say after a step, or None."""
        if len(times) < 2 or not self.settings.factor:
            return None
        if self.steps == 0:
            self.busy_s, self.data_wait_s = [0.0] * len(times), [0.0] * len(times)
        self.steps += 1
        for rank, each in enumerate(times):
            self.busy_s[rank] += each.busy_s
            self.data_wait_s[rank] += each.data_wait_s
        if self.steps < self.settings.window:
            return None
        means, self.steps = [total / self.settings.window for total in self.busy_s], 0
        median, slowest = statistics.median_low(means), max(means)
        if slowest <= self.settings.factor * median:
            return None
        rank = means.index(slowest)
        data = self.data_wait_s[rank] / self.settings.window
        return (
            f"Rank {rank} is slow: its own work takes {slowest:.3g} s a step ({data:.3g} s of it waiting for data), "
            f"{slowest / median:.1f} times the median of all ranks ({median:.3g} s), on average over "
            f"{self.settings.window} steps."
        )
