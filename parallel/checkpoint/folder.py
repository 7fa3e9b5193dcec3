"""The folder of a run's checkpoints: list them, name the newest, remove old ones."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Self

from common.errors import STORAGE_ERRNOS, Notice, StorageFailed
from common.files import write_text

FOLDER = re.compile(r"step_([0-9]{8,})")


class CheckpointFolder:
    """Checkpoints as folders `step_…`; the newest of them is the step that a run continues from.

    The newest `keep_last` trusted ones are kept, those whose step is a multiple of `keep_every` (0 = none), and the
    `keep_best` ones with the greatest `extra["score"]["goodness"]`; of equal ones the later.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int = 0, keep_best: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every, self.keep_best = Path(folder), keep_last, keep_every, keep_best

    @classmethod
    def from_run(cls, run_folder: str | Path, keep_last: int = 2, keep_every: int = 0, keep_best: int = 0) -> Self:
        """Return the checkpoints of a run, which may have none yet."""
        return cls(Path(run_folder, "checkpoints"), keep_last, keep_every, keep_best)

    def write_latest(self, step: int | None) -> None:
        """Write the name of a step's checkpoint to `latest`, and wait until it is on disk; remove the file for None."""
        if step is None:
            (self.folder / "latest").unlink(missing_ok=True)
        else:
            write_text(self.folder / "latest", self.path(step).name, durable=True)

    def forget_after(self, step: int) -> None:
        """Remove the checkpoints after `step`; the newest one left becomes `latest`.

        `latest` is on disk first, and the newest are removed first: a kill in between leaves no gap.
        """
        steps = self.steps()
        self.write_latest(max((saved for saved in steps if saved <= step), default=None))
        for saved in reversed(steps):
            if saved > step:
                self.remove(saved)

    def prune(self) -> None:
        """Remove checkpoints older than the newest trusted one, except those that must be kept."""
        for old in self._old():
            try:
                self.remove(old)
            except OSError as error:  # only space is lost: the new checkpoint is whole
                warnings.warn(f"checkpoint {self.path(old)} could not be removed ({error})", Notice, stacklevel=2)

    def _old(self) -> list[int]:
        try:
            trusted = self.trusted_steps()
            kept = {*trusted[-self.keep_last :], *(s for s in trusted if self.keep_every and s % self.keep_every == 0)}
            kept |= set(self._best(trusted))
            return [step for step in self.steps() if step < trusted[-1] and step not in kept]
        except (OSError, StorageFailed) as error:
            warnings.warn(f"old checkpoints in {self.folder} could not be listed ({error})", Notice, stacklevel=3)
            return []

    def _best(self, steps: list[int]) -> list[int]:
        """Return the `keep_best` steps with the best scores, the best first."""
        if not self.keep_best:
            return []
        scores = {step: (self.extra(step).get("score") or {}).get("goodness") for step in steps}
        rated = [step for step in steps if isinstance(scores[step], float)]
        return sorted(rated, key=lambda step: (scores[step], step), reverse=True)[: self.keep_best]

    def remove(self, step: int) -> None:
        """Remove a checkpoint; a kill in between leaves no half of it under its name."""
        removed = self.path(step).with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        os.replace(self.path(step), removed)
        shutil.rmtree(removed)

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, oldest first."""
        try:
            with os.scandir(self.folder) as entries:
                found = [(FOLDER.fullmatch(entry.name), entry) for entry in entries]
                return sorted(int(name[1]) for name, entry in found if name and entry.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:  # not an empty list: the run would begin anew
            raise_if_storage_failed(error, self.folder)
            raise

    def trusted_steps(self) -> list[int]:
        """Return the steps of the checkpoints that were saved outside any row of skipped steps, oldest first."""
        return [step for step in self.steps() if self._content(step).get("trusted", True)]

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, or None if there is none."""
        return max(self.steps(), default=None)

    def named_latest(self) -> str | None:
        """Return the text of `latest`, or None if there is no such file; it may name a missing checkpoint."""
        try:
            return (self.folder / "latest").read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise_if_storage_failed(error, self.folder)
            return None

    def lost(self) -> str | None:
        """Return the name of a checkpoint that is gone or damaged, if none is left to load; else None."""
        if self.steps():
            return None
        damaged = sorted(folder.name for folder in self.folder.glob("step_*.damaged"))
        named = self.named_latest()
        return damaged[-1] if damaged else named if named is None else named or "latest"

    def renamed(self) -> str | None:
        """Describe the newest checkpoint if it holds another step than that of its name; else return None."""
        step = self.latest_step()
        held = None if step is None else self._content(step).get("step", step)
        return None if held == step or step is None else f"{self.path(step)} holds the state of step {held}"

    def latest_extra(self) -> dict[str, Any]:
        """Return `extra` of the newest checkpoint with a legible `state.json`, {} if there is none."""
        found = (self._content(step).get("extra") for step in reversed(self.steps()))
        return next((extra for extra in found if isinstance(extra, dict)), {})

    def frozen(self, step: int) -> list[str]:
        """Return the logical tensors that were frozen when a step's checkpoint was saved."""
        found = self._content(step).get("frozen")
        return found if isinstance(found, list) else []

    def extra(self, step: int) -> dict[str, Any]:
        """Return `extra` of a step's checkpoint, {} if there is none that is legible."""
        found = self._content(step).get("extra")
        return found if isinstance(found, dict) else {}

    def _content(self, step: int) -> dict[str, Any]:
        """Read `state.json` of a checkpoint: {} if it is damaged, which loading reports. Raises StorageFailed."""
        try:
            content = json.loads((self.path(step) / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise_if_storage_failed(error, self.path(step))
            return {}
        return content if isinstance(content, dict) else {}

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"


def raise_if_storage_failed(error: Exception, path: Path) -> None:
    """Raise StorageFailed for an error of the disk, which often passes and is no sign of a damaged file."""
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        raise StorageFailed(f"{path} could not be read ({error.strerror}); start again when its storage is back.")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, and wait until it is on disk."""
    write_text(file, json.dumps(content, indent=1), durable=True)
