"""Follow a training run: name every checkpoint that has no scores of a task yet, and wait for the next."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.errors import RunStopped
from common.progress import beat
from parallel.checkpoint.folder import CheckpointFolder
from parallel.layout import Layout
from train.config import RunConfig

PAUSE_S = 5.0  # between two looks into the run's folder


def follow(config: RunConfig, layout: Layout) -> Iterator[int]:
    """Yield the steps of checkpoints without scores, oldest first, until that of `run.steps` has them.

    A collective of all ranks. Raises RunStopped where no checkpoint comes for `evaluation.follow_s` seconds.
    """
    last, since, settings = 0, time.monotonic(), config.evaluation
    while last < config.run.steps:
        beat(f"waiting for a checkpoint after step {last}")
        step, scored, late = layout.broadcast_from_main(partial(look, config, last, since))
        if step is not None:
            if not scored:
                yield step
            last, since = step, time.monotonic()
        elif late:
            raise RunStopped(
                f"{config.run.folder} has no checkpoint after step {last} for evaluation.follow_s="
                f"{settings.follow_s:g} s, though it is to train {config.run.steps} steps; continue the run, and start "
                "this again: it goes on where it ended."
            )
        elif layout.rank == 0:
            time.sleep(PAUSE_S)


def look(config: RunConfig, last: int, since: float) -> tuple[int | None, bool, bool]:
    """Return (next step with a checkpoint, whether it has scores, whether none has come for too long)."""
    step = next_step(config, last)
    scored = step is not None and scores_file(config, step).exists()
    return step, scored, time.monotonic() - since > config.evaluation.follow_s


def next_step(config: RunConfig, after: int) -> int | None:
    """Return the oldest step after `after` that has a checkpoint, None where there is none yet."""
    return next((step for step in CheckpointFolder.from_run(config.run.folder).steps() if step > after), None)


def scores_file(config: RunConfig, step: int) -> Path:
    """Return the file of a task's scores at a step."""
    return Path(config.run.folder, "tasks", config.task.name, f"step_{step:08d}", "evaluation.json")


def wait_for_run(folder: Path, settings: str, follow_s: float) -> None:
    """Wait until a run that is about to begin has written its settings, for `follow_s` seconds at most."""
    since = time.monotonic()
    while not (folder / settings).is_file() and time.monotonic() - since < follow_s:
        time.sleep(PAUSE_S)
