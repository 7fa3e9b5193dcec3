"""Skip steps that cannot be trusted, and decide whether a run that skips many goes back or stops.

A loss that is not finite, or that spikes, is skipped on all ranks alike, because every rank sees the same losses.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import RunStopped
from train.config import GuardConfig
from train.run.skipped_batches import MOST_FILES, SkippedBatches


class SpikeGuard:
    """Judge each loss by the losses of the accepted steps before it."""

    def __init__(self, config: GuardConfig, recent: Sequence[float] = ()) -> None:
        """`recent`: the losses that the restored checkpoint holds."""
        self.config = config
        self.recent: deque[float] = deque(recent, maxlen=config.window)

    def verdict(self, loss: float) -> str | None:
        """Return why the step of this loss must be skipped, None where it can be trusted."""
        if not math.isfinite(loss):
            return "loss is not finite"
        if len(self.recent) < self.config.window:
            return None
        median = statistics.median(self.recent)
        limit = max(median * self.config.spike_factor, median + self.config.spike_margin)
        return f"loss spikes to {loss:.3g} (median {median:.3g})" if loss > limit else None


class SkippedSteps:
    """Count skipped steps in a row, and decide after each step whether the run continues, goes back or stops.

    It owns the judge of losses (`SpikeGuard`), the row of skipped steps, and the file of batches that a roll-back left
    out (`SkippedBatches`).
    """

    def __init__(
        self,
        config: GuardConfig,
        batches: SkippedBatches,
        folder: Path,
        recent: Sequence[float] = (),
        row: Sequence[int] = (),
    ) -> None:
        """`recent`, `row`: the accepted losses, and the batches of the row of skipped steps, of the last checkpoint."""
        self.config, self.batches, self.folder = config, batches, folder
        self.guard = SpikeGuard(config, recent)
        self.row: list[int] = list(row)  # the batches of the steps that were skipped since the last accepted one
        self.cause = "loss or the gradient could not be trusted"  # of the last skipped step

    @property
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for a resumed run to judge and count as this one would."""
        return {"guard": list(self.guard.recent)} | ({"bad": list(self.row)} if self.row else {})

    def accept(self, loss: float) -> None:
        """Count a step whose update was made."""
        self.guard.recent.append(loss)
        self.row.clear()

    def skip(self, step: int, cause: str) -> None:
        """Count a step that was skipped because of `cause`."""
        self.row.append(self.batches.batch_number(step))
        self.cause = cause

    def roll_back_to(self, step: int) -> int | None:
        """Return the step that the run must go back to after `step`, None where it continues.

        Raises RunStopped where it must go back once more than `guard.roll_back` allows.
        """
        if len(self.row) < self.config.max_in_a_row:
            return None
        if self.batches.roll_backs >= self.config.roll_back:
            raise RunStopped(
                f"The run stopped at step {step}: {len(self.row)} steps in a row were skipped (the last because the "
                f"{self.cause}); the ids of their examples (of the newest {MOST_FILES} steps at most) are in "
                f"{self.folder}/bad_batch_step_*.json."
            )
        return step - len(self.row)


def check_end(step: int, row: Sequence[int], folder: Path) -> None:
    """Raise RunStopped where a run of `step` steps ends in a row of two or more skipped ones.

    One bad batch may come last. Two in a row may mean that the update before them spoiled the weights.
    """
    if len(row) > 1:
        raise RunStopped(
            f"All {step} steps of {folder} are done, but the last {len(row)} were skipped in a row, so the weights may "
            f"be spoiled since step {step - len(row)}: see {folder}/bad_batch_step_*.json, and train anew with a lower "
            "schedule.peak, or go on with more run.steps."
        )
