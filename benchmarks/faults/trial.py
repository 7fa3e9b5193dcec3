"""The records of a fault: its definition, one trial of it, and the result."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.job import EVERY, Job

STRIKE_AT = EVERY + 2  # a step between two checkpoints


@dataclass
class Trial:
    """A job and the fault injected into it; `undo` is closed at the end."""

    job: Job
    corpus: Path
    undo: ExitStack
    struck_at: float = 0.0  # time.monotonic()
    step: int = 0  # the last one recorded when the fault struck
    reported: bool = False  # whether the job noticed the fault, where `strike` can judge it

    def strikes(self) -> None:
        """Note the time and step of the fault."""
        self.struck_at, self.step = time.monotonic(), self.job.step()


@dataclass(frozen=True)
class Fault:
    """One kind of fault, as functions of a trial.

    `prepare` runs before the start, `strike` while the job trains (it calls `Trial.strikes`), `repair` before the
    command is started again.
    """

    name: str
    strike: Callable[[Trial], None]
    report: str = ""
    """Pattern that the job's log must contain; empty requires none."""
    ends: bool = True
    """Whether the fault ends the job."""
    prepare: Callable[[Trial], None] = lambda trial: None
    repair: Callable[[Trial], None] = lambda trial: None
    settings: tuple[str, ...] = ()
    module: str = "train.pretrain"
    nodes: int = 1
    reference: str = "undisturbed"
    """The run whose loss curve must come out; see `runner.SKIPPED_BATCHES`."""
    needs: Callable[[], str | None] = lambda: None
    """Returns the reason why this machine cannot run the trial, or None."""


@dataclass
class Result:
    """One row of the table; seconds are counted from the fault."""

    fault: str
    happened: str
    detected_s: float | None = None
    training_again_s: float | None = None
    steps_lost: int | None = None
    equal: bool | None = None
    survived: bool = False
