"""Weights & Biases: one rank talks to it, a resumed run stays the same run, its failing never stops training."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from train.config import RunConfig, to_dict
from train.metrics import Line
from train.samples import Sample

LOGGED_STEP = "logged_step"


class Tracker(Protocol):
    """Where metrics go besides `metrics.jsonl`."""

    run_id: str | None

    def log(self, line: Line) -> None:
        """One step's metrics."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Generated answers with their pictures."""

    def close(self) -> None:
        """The run has ended."""


class NoTracker:
    """For tracker=none, and every rank but the first."""

    run_id: str | None = None

    def log(self, line: Line) -> None:
        pass

    def samples(self, step: int, samples: list[Sample]) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Talks to wandb; after the first failure it warns once and stays silent."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None) -> None:
        """`run_id`: of the run that a checkpoint came from, or None for a new one."""
        self.run_id = run_id
        self.run: Any = None
        self.logged_file = folder / "wandb" / LOGGED_STEP
        # Steps that are run again after a crash are equal to those that were logged before it.
        resumed = run_id is not None and self.logged_file.exists()
        self.logged_step = int(self.logged_file.read_text()) if resumed else 0
        self._try(lambda: self._start(config, folder))

    def _start(self, config: RunConfig, folder: Path) -> None:
        import wandb  # takes a second to import, and only one rank needs it

        settings = config.tracker
        mode = os.environ.get("WANDB_MODE") or settings.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        home = folder / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DATA_DIR", str(home))  # pictures of tables wait here for `wandb sync`
        self.run = wandb.init(
            project=settings.project,
            group=settings.group,
            tags=settings.tags,
            notes=settings.notes,
            mode=mode,  # type: ignore[arg-type]
            name=config.run.name,
            dir=str(folder),
            id=self.run_id,
            resume="allow" if mode == "online" else None,
            config=to_dict(config),
            settings=wandb.Settings(silent=True),
        )
        self.run_id = self.run.id

    def log(self, line: Line) -> None:
        if self.run is not None and line["step"] > self.logged_step:
            self._try(lambda: self._log(line))

    def _log(self, line: Line) -> None:
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])
        self.logged_step = line["step"]
        self.logged_file.write_text(str(self.logged_step))

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self.run is not None and step >= self.logged_step:
            self._try(lambda: self._log_samples(step, samples))

    def _log_samples(self, step: int, samples: list[Sample]) -> None:
        import wandb

        table = wandb.Table(columns=["picture", "objective", "language", "prompt", "reference", "prediction"])
        for s in sorted(samples, key=lambda s: s.picture is None):  # the first row gives the column its type
            picture = None if s.picture is None else wandb.Image(s.picture)
            table.add_data(picture, s.objective, s.language, s.prompt, " / ".join(s.references), s.prediction)
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        if self.run is not None:
            self._try(self.run.finish)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training goes on
            warnings.warn(f"wandb failed and is turned off for this run: {error}", RuntimeWarning, stacklevel=3)
            self.run = None


def open_tracker(config: RunConfig, folder: Path, run_id: str | None, rank: int) -> Tracker:
    """The tracker of this rank."""
    if rank != 0 or config.tracker.name == "none":
        return NoTracker()
    return WandbTracker(config, folder, run_id)
