"""Weights & Biases: one rank talks to it, a resumed run stays the same run, its failing never stops training."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from errors import Notice
from train.config import RunConfig, to_dict
from train.metrics import Line
from train.provenance import STAGE_COLUMNS
from train.samples import Sample

INIT_TIMEOUT_S = 60.0
LOGGED_STEP, RUN_ID = "logged_step", "run_id"


class Tracker(Protocol):
    """Where metrics go besides `metrics.jsonl`."""

    run_id: str | None

    def stages(self, rows: list[list[Any]]) -> None:
        """What each pipeline stage holds, in columns of `provenance.STAGE_COLUMNS`."""

    def log(self, line: Line) -> None:
        """One step's metrics."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Generated answers with their pictures."""

    def alert(self, title: str, text: str) -> None:
        """Something that a user wants to be told of."""

    def close(self) -> None:
        """The run has ended."""


class NoTracker:
    """For tracker=none, and every rank but the first."""

    run_id: str | None = None

    def stages(self, rows: list[list[Any]]) -> None:
        pass

    def log(self, line: Line) -> None:
        pass

    def samples(self, step: int, samples: list[Sample]) -> None:
        pass

    def alert(self, title: str, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """Talks to wandb; after the first failure it warns once and stays silent."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None, facts: Mapping[str, Any]) -> None:
        """`run_id`: of the run that a checkpoint came from, or None; `facts` are kept beside the configuration."""
        self.home = folder / "wandb"
        self.run_id = run_id or _read(self.home / RUN_ID)  # a run may die before its first checkpoint
        self.run: Any = None
        # Steps that are run again after a crash are equal to those that were logged before it.
        self.logged_step = int((self.run_id and _read(self.home / LOGGED_STEP)) or 0)
        self.own_step = 0  # the last one that this process has logged
        self._try(lambda: self._start(config, folder, facts))

    def _start(self, config: RunConfig, folder: Path, facts: Mapping[str, Any]) -> None:
        import wandb  # takes a second to import, and only one rank needs it

        mode = os.environ.get("WANDB_MODE") or config.tracker.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        self.home.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_DATA_DIR", str(self.home))  # pictures of tables wait here for `wandb sync`
        try:
            self.run = self._init(config, folder, facts, mode)
        except Exception as error:
            if mode != "online":
                raise
            warnings.warn(
                f"wandb cannot be reached ({error}); the run is kept in {self.home}, send it later with `wandb sync`.",
                Notice,
                stacklevel=2,
            )
            self.run = self._init(config, folder, facts, "offline")
        self.run_id = str(self.run.id)
        (self.home / RUN_ID).write_text(self.run_id, encoding="utf-8")

    def _init(self, config: RunConfig, folder: Path, facts: Mapping[str, Any], mode: str) -> Any:
        import wandb

        settings, git = config.tracker, facts.get("git", {})
        dirty = " with changes that are not committed" if git.get("dirty") else ""
        return wandb.init(
            project=settings.project,
            group=settings.group,
            tags=settings.tags,
            notes=settings.notes or (f"commit {git['commit']}{dirty}" if git.get("commit") else None),
            mode=mode,  # type: ignore[arg-type]
            name=config.run.name,
            dir=str(folder),
            id=self.run_id,
            resume="allow" if mode == "online" else None,
            config={**to_dict(config), **facts},
            settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S),
        )

    def stages(self, rows: list[list[Any]]) -> None:
        if self.run is not None:
            self._try(lambda: self._stages(rows))

    def _stages(self, rows: list[list[Any]]) -> None:
        import wandb

        self.run.summary["stages"] = wandb.Table(
            columns=list(STAGE_COLUMNS), data=rows
        )  # in the history it would be a step

    def log(self, line: Line) -> None:
        if self.run is not None and line["step"] > self.logged_step:
            self._try(lambda: self._log(line))

    def _log(self, line: Line) -> None:
        self.logged_step = self.own_step = line["step"]
        scratch = self.home / f"{LOGGED_STEP}.tmp"
        scratch.write_text(str(self.logged_step), encoding="utf-8")
        os.replace(scratch, self.home / LOGGED_STEP)  # first: whoever dies here logs no step twice
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self.run is not None and step == self.own_step:
            self._try(lambda: self._log_samples(step, samples))

    def _log_samples(self, step: int, samples: list[Sample]) -> None:
        import wandb

        table = wandb.Table(columns=["picture", "objective", "language", "prompt", "reference", "prediction"])
        for s in sorted(samples, key=lambda s: s.picture is None):  # the first row gives the column its type
            picture = None if s.picture is None else wandb.Image(s.picture)
            table.add_data(picture, s.objective, s.language, s.prompt, " / ".join(s.references), s.prediction)
        self.run.log({"samples": table}, step=step)

    def alert(self, title: str, text: str) -> None:
        if self.run is not None:
            self._try(lambda: self.run.alert(title=title, text=text))

    def close(self) -> None:
        if self.run is not None:
            self._try(self.run.finish)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training goes on
            warnings.warn(f"wandb failed and is turned off for this run: {error}", Notice, stacklevel=3)
            self.run = None


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") or None if file.exists() else None


def open_tracker(
    config: RunConfig, folder: Path, run_id: str | None, rank: int, facts: Mapping[str, Any] | None = None
) -> Tracker:
    """The tracker of this rank; `facts`: what the run was made with, e.g. {"git": {"commit": …, "dirty": …}}."""
    if rank != 0 or config.tracker.name == "none":
        return NoTracker()
    return WandbTracker(config, folder, run_id, facts or {})
