"""Track a run in Weights & Biases: a resumed run keeps its id, and a failure never stops training."""

import os
import secrets
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
# Variables that make several runs one curve, or branch one. Every later command, job and run of a sweep inherits an
# exported variable, but here a run is identified by its folder, which holds its id.
IDENTITIES = ("WANDB_RUN_ID", "WANDB_RUN_NAME", "WANDB_NAME", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM",
              "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SWEEP_URL")  # fmt: skip


class Tracker:
    """Send metrics to a service besides `metrics.jsonl`; this base class sends nothing (tracker=none, other ranks)."""

    run_id: str | None = None

    def stages(self, rows: list[list[Any]]) -> None:
        """Send a row for each pipeline stage, in columns of `provenance.STAGE_COLUMNS`."""

    def log(self, line: Line) -> None:
        """Send the metrics of one step."""

    def samples(self, step: int, samples: list[Sample]) -> None:
        """Send predictions with their images."""

    def alert(self, title: str, text: str) -> None:
        """Send a message that the user must see soon."""

    def close(self) -> None:
        """Send what is pending, at the end of the run."""


def wandb_mode(config: RunConfig) -> str:
    """Return online or offline where the mode is `auto`, else the mode; the environment's WANDB_MODE comes first."""
    import wandb  # takes a second to import

    mode = os.environ.get("WANDB_MODE") or config.tracker.mode
    if mode == "auto":
        return "online" if wandb.login(prompt=False) else "offline"
    return mode


class WandbTracker(Tracker):
    """Send metrics to Weights & Biases; after the first failure warn once and send nothing more."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str | None, facts: Mapping[str, Any]) -> None:
        """Start or resume a run of wandb.

        `run_id`: its id in the restored checkpoint, or None; `facts` are sent beside the configuration.
        """
        self.home = folder / "wandb"
        original = original_folder(self.home)
        self.run_id = (
            None if original else run_id or _read(self.home / RUN_ID)
        )  # read the file, because a run may be killed before its first checkpoint
        self.run: Any = None
        self.gave_data_dir = False
        # Steps after a crash repeat those logged before it with equal values -> they are not sent twice.
        self.logged_step = int((self.run_id and _read(self.home / LOGGED_STEP)) or 0)
        self.own_step = 0  # the last step that this process has logged
        if original:
            _notice(f"{folder} is a copy of {original}; it is tracked as a run of its own.")
        ignore_identities()
        self._try(lambda: self._start(config, folder, facts))

    def _start(self, config: RunConfig, folder: Path, facts: Mapping[str, Any]) -> None:
        import wandb  # takes a second to import, and only one rank needs it; it reads the environment once

        mode = wandb_mode(config)
        self.home.mkdir(parents=True, exist_ok=True)
        if DATA_DIR not in os.environ:  # images of tables wait here for `wandb sync`
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
            wandb.teardown()  # else wandb's service refuses the id, which the failed attempt holds
            self.run = self._init(config, folder, facts, "offline")
        if str(self.run.id) != self.run_id:  # a wandb agent gave it another id
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
        """See Tracker.stages."""
        if self.run is not None:
            self._try(lambda: self._stages(rows))

    def _stages(self, rows: list[list[Any]]) -> None:
        import wandb

        self.run.summary["stages"] = wandb.Table(
            columns=list(STAGE_COLUMNS), data=rows
        )  # not in the history, where it would count as a step

    def log(self, line: Line) -> None:
        """See Tracker.log."""
        if self.run is not None and line["step"] > self.logged_step:
            self._try(lambda: self._log(line))

    def _log(self, line: Line) -> None:
        self.logged_step = self.own_step = line["step"]
        self._keep(LOGGED_STEP, str(self.logged_step))  # before the log: a process killed in between logs no step twice
        self.run.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def samples(self, step: int, samples: list[Sample]) -> None:
        """See Tracker.samples."""
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
        """See Tracker.alert."""
        if self.run is not None:
            self._try(lambda: self.run.alert(title=title, text=text))

    def close(self) -> None:
        """See Tracker.close."""
        if self.run is not None:
            self._try(self.run.finish)
        if self.gave_data_dir:  # the next run of a sweep has a folder of its own
            os.environ.pop(DATA_DIR, None)

    def _keep(self, name: str, text: str) -> None:
        write_bytes(self.home / name, text.encode("utf-8", "surrogateescape"))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # a tracker's errors must never stop training
            warnings.warn(f"wandb failed and is turned off for this run: {error}", Notice, stacklevel=3)
            self.run = None


def ignore_identities() -> None:
    """Remove the variables of the environment that name a run of wandb, with a notice; see `forget_identities`."""
    if ignored := forget_identities(os.environ):
        _notice(f"{', '.join(ignored)} from the environment is ignored: it would make several runs one curve.")


def forget_identities(environment: MutableMapping[str, str]) -> list[str]:
    """Remove the variables that name a run of wandb, and return their names.

    Those of a wandb agent are kept, because it gives each process an id of its own. A Hydra sweep makes all its runs in
    one process, so there they are removed as well.
    """
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if environment.get("WANDB_SWEEP_ID") and not multirun:
        return []
    return [name for name in IDENTITIES if environment.pop(name, None)]


def original_folder(home: Path) -> str | None:
    """Return the run folder that this one was copied from, if it still exists with the same wandb id."""
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
    """Return the tracker of this rank.

    `facts`: what the run was made with, e.g. {"git": {"commit": …, "dirty": …}}.
    """
    if rank != 0 or config.tracker.name == "none":
        return Tracker()
    return WandbTracker(config, folder, run_id, facts or {})
