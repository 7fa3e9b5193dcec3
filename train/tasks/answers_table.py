"""Send the scores and answers of a task's evaluation to Weights & Biases, as a run of its own."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import Notice
from evaluation.html_report import Entry
from train.config import RunConfig
from train.run.tracking import INIT_TIMEOUT_S, ignore_identities, wandb_mode

MOST_ROWS = 1000
COLUMNS = ("image", "id", "language", "prompt", "references", "prediction", "score", "right", "blind")


def send_answers(
    config: RunConfig, step: int, scores: Mapping[str, float], entries: Sequence[Entry], folder: Path
) -> None:
    """Send `scores` and a table of the first entries, where the run has a tracker; a failure is a warning.

    The run is a new one in the group of the trained run, as that may be training still. `folder`: for its files.
    """
    if config.tracker.name == "none":
        return
    try:
        _send(config, step, scores, entries, folder)
    except Exception as error:  # the scores are in files already
        warnings.warn(f"wandb failed, so it does not have the answers: {error}", Notice, stacklevel=2)


def _send(config: RunConfig, step: int, scores: Mapping[str, float], entries: Sequence[Entry], folder: Path) -> None:
    import wandb  # takes a second to import

    ignore_identities()  # else the answers would go into the run that the environment names
    run: Any = wandb.init(
        project=config.tracker.project,
        group=config.tracker.group or config.run.name,
        tags=config.tracker.tags,
        job_type="evaluation",
        mode=wandb_mode(config),  # type: ignore[arg-type]
        name=f"{config.run.name}/{config.task.name}",
        dir=str(folder),
        config={"run": config.run.name, "task": config.task.name, "step": step},
        settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S),
    )
    table = wandb.Table(columns=list(COLUMNS))
    for e in sorted(entries[:MOST_ROWS], key=lambda entry: not entry.image):  # the first row gives columns their types
        image = wandb.Image(_pixels(e.image)) if e.image else None
        table.add_data(
            image, e.id, e.language, e.prompt, " / ".join(e.references), e.prediction, e.score, e.right, e.blind
        )
    run.log({f"{config.task.name}/{name}": value for name, value in scores.items()}, step=step)
    run.log({"answers": table}, step=step)
    run.finish()


def _pixels(url: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
