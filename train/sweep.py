"""Run a sweep (`python -m train.pretrain -m vit=base,large …`): report a run that fails, and begin the next."""

import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from common.errors import ConfigurationError
from common.launcher import this_process
from train.health import exit_note as note

FOLDER_NAME_LIMIT = 150  # characters; file systems allow 255


class FailedRuns(Exception):
    """Report failed runs of a sweep; the message is one sentence, `code` the exit code of the first of them."""

    def __init__(self, failed: dict[str, str], runs: int, code: int) -> None:
        """`failed`: the end of each failed run, by its name; `runs`: the number of all runs."""
        named = "; ".join(f"{name} ({what})" for name, what in failed.items())
        super().__init__(f"{len(failed)} of {runs} runs failed, and the same command tries them again: {named}.")
        self.code = code


class Sweep:
    """Call the runs one after another in this process."""

    def __init__(self) -> None:
        self.runs = 0
        self.failed: dict[str, int] = {}
        self.folders: set[str] = set()

    def claim(self, composed: DictConfig) -> DictConfig:
        """Return a run's configuration; raise ConfigurationError if an earlier run has the same folder.

        The later run would resume the earlier one.
        """
        check_own_folder(composed.run.folder, self.folders)
        return composed

    def run(self, name: str, work: Callable[[], None]) -> int:
        """Call one run and return its exit code. `work` raises SystemExit after an error that it has printed itself.

        Raises SystemExit if the sweep must end: after a signal, or a failure of one rank that the others wait for.
        """
        self.runs += 1
        try:
            work()
            return 0
        except SystemExit as end:
            error = end.__context__
            alone = getattr(error, "alone", isinstance(error, (OSError, MemoryError, RuntimeError)))
            if end.code not in (2, 3) or (alone and this_process().world_size > 1):
                raise
            code = end.code
            note.withdraw()
        except Exception:
            traceback.print_exc()
            code = 1
            if this_process().world_size > 1:
                sys.exit(code)
        self.failed[name] = int(code)
        return int(code)

    def check(self) -> None:
        """Raise FailedRuns if any run failed."""
        if self.failed:
            ends = {name: f"exit code {code}" for name, code in self.failed.items()}
            raise FailedRuns(ends, self.runs, next(iter(self.failed.values())))


def check_lists(words: Sequence[str]) -> None:
    """Raise ConfigurationError for a word that sweeps the list of a sweep's values, in place of the values."""
    lists = "task.recipe.sweep."
    for word in words:
        key, _, values = word.lstrip("+").partition("=")
        if key.startswith(lists) and "," in values and values[0] not in "'\"":
            raise ConfigurationError(
                f"{word} would be swept itself, beside the values that it lists; write "
                f"task.recipe.{key.removeprefix(lists)}={values}, which replaces them."
            )


def check_own_folder(folder: str, folders: set[str]) -> None:
    """Add a run's folder to those of the sweep's runs before it; raise ConfigurationError if it is there."""
    if os.path.normpath(folder) in folders:
        raise ConfigurationError(
            f"{folder} is the folder of two runs of this sweep; leave run.folder out where run.name is swept, and give "
            "each value once."
        )
    folders.add(os.path.normpath(folder))


def folder_name(overrides: str) -> str:
    """Return a sweep's overrides as the name of one folder: without slashes, and with a digest if it is too long."""
    name = overrides.replace("/", "_")
    if len(name) > FOLDER_NAME_LIMIT:
        name = name[: FOLDER_NAME_LIMIT - 9] + "~" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return name


def join_sweep(composed: DictConfig, overrides: str) -> None:
    """Set folder and name of a sweep's run to its own, and its tracker group to the sweep's name."""
    own = folder_name(overrides)
    if composed.tracker.group is None:
        composed.tracker.group = composed.run.name
    composed.run.folder, composed.run.name = f"{composed.run.folder}/{own}", f"{composed.run.name}/{own}"
