"""Stop a run that keeps restarting without saving a newer checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from common.errors import RunStopped
from common.files import write_text
from train.run.run import Run

COUNTERS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def stop_if_in_vain(run: Run) -> None:
    """Raise RunStopped after more than `run.restarts_without_progress` restarts that saved nothing new.

    Only restarts by Slurm or torchrun count; one by the user sets the count to 0. A collective of all ranks.
    """
    step, most = run.checkpoints.steps_done(), run.config.run.restarts_without_progress
    vain = count(run.folder / "restarts.json", step, was_restarted(os.environ)) if run.is_main_rank else 0
    if run.layout.any_rank(vain > most):
        raise RunStopped(
            f"{run.folder} was restarted {most} times without saving anything after step {step}, so it stops; correct "
            "the cause (see the log) and start it again (run.restarts_without_progress sets how often it is tried)."
        )


def count(file: Path, step: int, restarted: bool) -> int:
    """Count the restarts in a row, this one included, at which the run was at step `step`; keep it in `file`."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        vain = before["restarts"] + 1 if restarted and before["step"] == step else 0
    except (OSError, ValueError, KeyError, TypeError):
        vain = 0
    write_text(file, json.dumps({"step": step, "restarts": vain}), durable=True)
    return vain


def was_restarted(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher restarted this process; false where a user started it."""
    return any(environment.get(name, "0") not in ("", "0") for name in COUNTERS)
