"""Steps that are not trusted: a loss that is not finite, or that spikes, is skipped; many in a row end the run."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import RunStopped
from common.files import write_text
from train.config import GuardConfig

MOST_BATCHES = 20  # files of skipped steps; a global batch of 4096 examples takes some 3 MB


class Guard:
    """Judges each step's loss by the losses before it. Every rank sees the same losses, so every rank judges alike."""

    def __init__(self, settings: GuardConfig, recent: Sequence[float] = (), bad: Sequence[int] = ()) -> None:
        """`recent`, `bad`: the losses and the row that the guard of the run's last checkpoint remembered."""
        self.settings = settings
        self.recent: deque[float] = deque(recent, maxlen=settings.window)
        self.bad: list[int] = list(bad)  # the batches of the steps in a row that were skipped

    @property
    def state(self) -> list[float]:
        """What a checkpoint must hold for a resumed run to judge as this one would."""
        return list(self.recent)

    def verdict(self, loss: float) -> str | None:
        """Why this loss must not be learned from, or None."""
        if not math.isfinite(loss):
            return "loss is not finite"
        if len(self.recent) < self.settings.window:
            return None
        median = statistics.median(self.recent)
        limit = max(median * self.settings.spike_factor, median + self.settings.spike_margin)
        return f"loss spikes to {loss:.3g} (median {median:.3g})" if loss > limit else None

    def accept(self, loss: float) -> None:
        """The step was taken."""
        self.recent.append(loss)
        self.bad.clear()

    def refuse(self, batch: int) -> None:
        """The step that was to learn from this batch was skipped."""
        self.bad.append(batch)

    @property
    def gives_up(self) -> bool:
        """Whether so many steps in a row were skipped that the run cannot go on from here."""
        return len(self.bad) >= self.settings.max_in_a_row


def save_bad_batch(folder: Path, step: int, cause: str, examples: list[dict[str, Any]]) -> Path:
    """Write the ids of a skipped step's examples, so that the cause can be looked for in the data.

    The newest `MOST_BATCHES` of these files stay in the folder.
    """
    path = folder / f"bad_batch_step_{step:08d}.json"
    write_text(path, json.dumps({"step": step, "cause": cause, "examples": examples}, indent=1, ensure_ascii=False))
    written = sorted(folder.glob("bad_batch_step_*.json"), key=lambda file: (file != path, -file.stat().st_mtime_ns))
    for file in written[MOST_BATCHES:]:
        file.unlink(missing_ok=True)
    return path


def check_end(step: int, bad: Sequence[int], folder: Path) -> None:
    """Raise RunStopped where a run of `step` steps ends in a row of skipped ones (`bad`), of two or more.

    One bad batch may come last. Where two do, nothing has judged the update before them.
    """
    if len(bad) > 1:
        raise RunStopped(
            f"All {step} steps of {folder} are done, but the last {len(bad)} were skipped in a row, so the weights may "
            f"be spoiled since step {step - len(bad)}: see {folder}/bad_batch_step_*.json, and train anew with a lower "
            "schedule.peak, or go on with more run.steps."
        )


def stopped(step: int, in_a_row: int, cause: str, folder: Path) -> RunStopped:
    """What the user is told when the run gives up."""
    return RunStopped(
        f"The run stopped at step {step}: {in_a_row} steps in a row were skipped (the last because the {cause}); "
        f"the ids of their examples (of the newest {MOST_BATCHES} steps at most) are in {folder}/bad_batch_step_*.json."
    )
