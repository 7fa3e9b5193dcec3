"""Weights & Biases: one rank talks to it, a resumed run stays the same run, its failing never stops training."""

import os
import secrets
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from common.errors import Notice
from common.files import write_bytes
from evaluation.sample_sheet import Sample
from train.config import RunConfig, to_dict
from train.run.metrics_file import Line
from train.run.provenance import STAGE_COLUMNS

INIT_TIMEOUT_S = 60.0
LOGGED_STEP, RUN_ID, FOLDER = "logged_step", "run_id", "folder"
DATA_DIR = "WANDB_DATA_DIR"
# What makes runs one curve, or branches of one. It is exported once and inherited by every later command, job and run
# of a sweep; a run of ours is its folder, and has the id that lies there.
IDENTITIES = ("WANDB_RUN_ID", "WANDB_RUN_NAME", "WANDB_NAME", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM",
              "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_URL")  # fmt: skip


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
        original = original_of(self.home)
        self.run_id = (
            None if original else run_id or _read(self.home / RUN_ID)
        )  # it may die before its first checkpoint
        self.run: Any = None
        self.gave_data_dir = False
        # Steps that are run again after a crash are equal to those that were logged before it.
        self.logged_step = int((self.run_id and _read(self.home / LOGGED_STEP)) or 0)
        self.own_step = 0  # the last one that this process has logged
        if original:
            _notice(f"{folder} is a copy of {original}; it is tracked as a run of its own.")
        if ignored := forget_identities(os.environ):
            _notice(f"{', '.join(ignored)} from the environment is ignored: it would make several runs one curve.")
        self._try(lambda: self._start(config, folder, facts))

    def _start(self, config: RunConfig, folder: Path, facts: Mapping[str, Any]) -> None:
        import wandb  # takes a second to import, and only one rank needs it; it reads the environment once

        mode = os.environ.get("WANDB_MODE") or config.tracker.mode
        if mode == "auto":
            mode = "online" if wandb.login(prompt=False) else "offline"
        self.home.mkdir(parents=True, exist_ok=True)
        if DATA_DIR not in os.environ:  # pictures of tables wait here for `wandb sync`
            os.environ[DATA_DIR], self.gave_data_dir = str(self.home), True
        self.run_id = self.run_id or secrets.token_hex(8)
        self._keep(RUN_ID, self.run_id)
        self._keep(FOLDER, str(folder.resolve()))
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
            wandb.teardown()  # its service holds the id of the attempt that failed, and would refuse it
            self.run = self._init(config, folder, facts, "offline")
        if str(self.run.id) != self.run_id:  # an agent's
            self.run_id = str(self.run.id)
            self._keep(RUN_ID, self.run_id)

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
        self._keep(LOGGED_STEP, str(self.logged_step))  # first: whoever dies here logs no step twice
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def samples(self, step: int, samples: list[Sample]) -> None:
        if self.run is not None and step == self.own_step:
            self._try(lambda: self._log_samples(step, samples))

    def _log_samples(self, step: int, samples: list[Sample]) -> None:
        import wandb

        table = wandb.Table(columns=["image", "objective", "language", "prompt", "reference", "prediction"])
        for s in sorted(samples, key=lambda s: s.image is None):  # the first row gives the column its type
            image = None if s.image is None else wandb.Image(s.image)
            table.add_data(image, s.objective, s.language, s.prompt, " / ".join(s.references), s.prediction)
        self.run.log({"samples": table}, step=step)

    def alert(self, title: str, text: str) -> None:
        if self.run is not None:
            self._try(lambda: self.run.alert(title=title, text=text))

    def close(self) -> None:
        if self.run is not None:
            self._try(self.run.finish)
        if self.gave_data_dir:  # the next run of a sweep has its own
            os.environ.pop(DATA_DIR, None)

    def _keep(self, name: str, text: str) -> None:
        write_bytes(self.home / name, text.encode("utf-8", "surrogateescape"))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever it is, training goes on
            warnings.warn(f"wandb failed and is turned off for this run: {error}", Notice, stacklevel=3)
            self.run = None


def forget_identities(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what would name a run from the environment, and return the names.

    A wandb agent gives each process an id of its own, which is kept; not so the runs of a Hydra sweep in one process.
    """
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if environment.get("WANDB_SWEEP_ID") and not multirun:
        return []
    return [name for name in IDENTITIES if environment.pop(name, None)]


def original_of(home: Path) -> str | None:
    """Return the run's folder that this one was copied from, if that is still there with the same run."""
    folder = _read(home / FOLDER)
    if folder is None:
        return None
    original = Path(folder, "wandb")
    with suppress(OSError):
        if not original.samefile(home) and _read(original / RUN_ID) == _read(home / RUN_ID):
            return folder
    return None


def _notice(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=4)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="surrogateescape") or None if file.exists() else None


def open_tracker(
    config: RunConfig, folder: Path, run_id: str | None, rank: int, facts: Mapping[str, Any] | None = None
) -> Tracker:
    """The tracker of this rank; `facts`: what the run was made with, e.g. {"git": {"commit": …, "dirty": …}}."""
    if rank != 0 or config.tracker.name == "none":
        return NoTracker()
    return WandbTracker(config, folder, run_id, facts or {})
