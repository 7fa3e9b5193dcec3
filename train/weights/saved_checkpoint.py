"""Find the checkpoint that a command line names: FOLDER, FOLDER@STEP or FOLDER@best."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from yaml import YAMLError

from common.errors import ConfigurationError
from common.values import expand_home
from parallel.checkpoint.folder import CheckpointFolder

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
SCORE = "validation/loss"  # of a run whose config.yaml names no other (checkpoint.best)
STEP = re.compile(r"[0-9]+|best|latest")


class SavedCheckpoint(NamedTuple):
    """A checkpoint of a run."""

    run: Path
    """The run's folder, with its config.yaml."""
    step: int
    path: Path
    """The checkpoint's own folder."""


def find_checkpoint(name: str, key: str = "checkpoint") -> SavedCheckpoint:
    """Return the checkpoint of `name`, the value of `key`: FOLDER means the run's latest, as FOLDER@latest does.

    FOLDER@best is the kept checkpoint with the best `checkpoint.best` in the run's metrics.jsonl: `validation/loss`, or
    the score of a fine-tuning's task. Raises ConfigurationError where the folder or the step does not exist; the
    message lists the steps that do.
    """
    folder, wanted = _parts(expand_home(name, key))
    if not folder.is_dir():
        raise ConfigurationError(f"{key}={name} is no folder of a run; name one, such as runs/demo or runs/demo@1000.")
    refuse_export(folder, key)
    checkpoints = CheckpointFolder.from_run(folder)
    steps = checkpoints.steps()
    if not steps:
        lost = checkpoints.lost()
        reason = f"though {lost} was one; bring it back from a copy" if lost else "yet; train the run first"
        raise ConfigurationError(f"{key}={name} holds no checkpoint {reason}.")
    if wanted == "best":
        step = _best(folder, steps, f"{key}={name}")
    else:
        step = steps[-1] if wanted == "latest" else int(wanted)
    if step not in steps:
        raise ConfigurationError(
            f"{key}={name} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}."
        )
    return SavedCheckpoint(folder, step, checkpoints.path(step))


def refuse_export(folder: Path, key: str) -> None:
    """Raise ConfigurationError where `key` names an exported model in place of a run."""
    if (folder / "config.json").is_file() and not CheckpointFolder.from_run(folder).steps():
        raise ConfigurationError(
            f"{key}={folder} is an export or another folder of weights, and no run; name the run that it was made "
            f"from, or train with weights.vit={folder} weights.mt5={folder} first."
        )


def run_folder(name: str, key: str = "checkpoint") -> Path:
    """Return the folder of the run that FOLDER, FOLDER@STEP or FOLDER@best names; it need not exist."""
    return _parts(expand_home(name, key))[0]


def names_step(name: str) -> bool:
    """Return whether a step is named, and not the latest: no other checkpoint will do in its place."""
    return _parts(name)[1] != "latest"


def _parts(name: str) -> tuple[Path, str]:
    """Split FOLDER@STEP; an @ in the name of an existing folder is part of it."""
    folder, at, step = name.rpartition("@")
    if at and STEP.fullmatch(step) and not Path(name).is_dir():
        return Path(folder), step
    return Path(name), "latest"


def scored(name: str, value: float) -> dict[str, Any]:
    """Return the score of a checkpoint as it is saved with it: the greater `goodness`, the better."""
    return {"name": name, "value": value, "goodness": -value if _is_loss(name) else value}


def _is_loss(name: str) -> bool:
    return "loss" in name.split("/")


def _score_name(folder: Path) -> str:
    """Return the metric by which the run's best checkpoint is chosen, from its config.yaml."""
    with suppress(OSError, YAMLError, AttributeError):
        settings = OmegaConf.load(folder / CONFIG)
        return str(OmegaConf.select(settings, "checkpoint.best") or SCORE)
    return SCORE


def _best(folder: Path, steps: list[int], name: str) -> int:
    """Return the kept step with the best score; of equal ones the later."""
    score = _score_name(folder)
    found: dict[int, float] = {}
    file = folder / METRICS
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
            found[int(line["step"])] = scored(score, float(line[score]))["goodness"]
        except (ValueError, KeyError, TypeError):  # a step without validation, or a line cut by a kill
            continue
    validated = [step for step in steps if step in found]
    if not validated:
        raise ConfigurationError(
            f"{name} has no checkpoint of a step that was validated ({score} in {file}); let checkpoint.every_steps "
            "be a multiple of evaluation.every_steps, or name a step."
        )
    return max(reversed(validated), key=found.__getitem__)
