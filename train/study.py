"""Run a study: the paper's experiments as sweeps of runs, each trained, evaluated, and compared on one page.

    python -m train.study
    python -m train.study seeds=3 full=true folder=runs/study_full
    python -m train.study study=web folder=runs/study_web -- data.root=/data/cc3m hydra/launcher=slurm
    python -m train.study --dry-run

Words after `--` are those of all runs. A run that is done is not trained again, one that was cut goes on from its
checkpoint. With `hydra/launcher=slurm` each sweep is one array. `--dry-run` checks every run and prints the commands.
Afterwards `python -m train.study_report` writes the page.
"""

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from common.command_line import parse as arguments_of
from common.errors import ConfigurationError, Interrupted
from common.terminal import use_utf8
from common.values import at_least
from train.entry import in_one_sentence, register
from train.studies.plan import FOLDER_VARIABLE, Cell, StudyOptions, StudySweep
from train.studies.processes import interrupt_on, run_side_by_side
from train.submit import Request
from train.submit import plan as check_jobs


@dataclass
class Options(StudyOptions):
    """Run a study: the paper's experiments as sweeps of runs."""

    sweeps: list[str] = field(default_factory=list)
    """Sweeps to run, by name. Empty by default: all, in the order of the file."""
    ranks: int = 1
    """Processes of each run on this machine. 1 by default; with GPUs, as many as take part."""
    jobs: int = 1
    """Sweeps side by side. 1 by default; with small models on CPUs, one a core."""
    dry_run: bool = False
    """Check every run, print the commands, and train nothing (`--dry-run`). False by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("", 1, ranks=self.ranks, jobs=self.jobs)


def main(arguments: Sequence[str]) -> None:
    """Train and evaluate what is not done. Raises ConfigurationError, Interrupted and RunStopped."""
    options, more = split(arguments)
    sweeps = options.read(more)
    for name in options.sweeps:
        if name not in sweeps:
            raise ConfigurationError(f"sweeps={name} is not a sweep of the study; it has {', '.join(sweeps)}.")
    os.environ[FOLDER_VARIABLE] = options.folder
    chosen = [sweeps[name] for name in options.sweeps or sweeps]
    if options.dry_run:
        check_study(chosen)
        return
    interrupt_on([signal.SIGTERM, signal.SIGINT])
    try:
        for sweep in chosen:
            run_sweep(sweep, options)
    except KeyboardInterrupt:
        raise Interrupted("The study was interrupted, and its runs were saved; the same command goes on.") from None


def split(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the options, and the words after `--`."""
    words = list(arguments)
    more = words[words.index("--") + 1 :] if "--" in words else []
    own = words[: len(words) - len(more) - 1] if "--" in words else words
    return arguments_of(["dry_run=true" if word == "--dry-run" else word for word in own], Options), more


def run_sweep(sweep: StudySweep, options: Options) -> None:
    """Train the runs of a sweep that are not trained, then evaluate those that are not evaluated."""
    cells = sweep.cells()
    progress = Progress(sweep.name, cells)
    for what in ("trained", "evaluated"):
        left = [cell for cell in cells if not getattr(cell, what)]
        if not left or (what == "evaluated" and not sweep.config.evaluate):
            continue
        module = f"train.{sweep.config.command}" if what == "trained" else "train.evaluate"
        of_array = any(word.startswith("hydra/launcher=") for word in sweep.more)
        parts = sweep.share(left, 1 if of_array else options.jobs)
        words = [sweep.training(part) if what == "trained" else sweep.evaluation(part) for part in parts]
        logs = [sweep.folder / f"{what}_{part}.log" for part in range(len(parts))]
        run_side_by_side([[module, *each] for each in words], logs, options.ranks, partial(progress.show, what))
        progress.show(what)


class Progress:
    """Print a line for every run that is done."""

    def __init__(self, name: str, cells: Sequence[Cell]) -> None:
        self.name, self.cells = name, cells
        self.shown = {(what, cell.folder) for what in ("trained", "evaluated") for cell in cells if getattr(cell, what)}
        print(
            f"{name}: {len(cells)} runs, {sum(what == 'trained' for what, _ in self.shown)} of them trained", flush=True
        )

    def show(self, what: str) -> None:
        """Print the runs that were trained, or evaluated, since the last call."""
        for cell in self.cells:
            if (what, cell.folder) not in self.shown and getattr(cell, what):
                self.shown.add((what, cell.folder))
                done = sum(each == what for each, _ in self.shown)
                print(f"{self.name}: {cell.folder.name} {what} ({done} of {len(self.cells)})", flush=True)


def check_study(sweeps: Sequence[StudySweep]) -> None:
    """Check every run as the run itself would, and print the commands; the output of earlier runs counts as there."""
    register()
    asked = []
    for sweep in sweeps:
        own = [word for word in sweep.words() if not word.startswith(("run.folder=", "hydra", "cluster"))]
        for cell in sweep.cells():
            values = [f"{key}={value}" for key, value in cell.values.items()]
            words = [*own, f"run.folder='{cell.folder}'", *values]
            asked.append(Request(sweep.config.command, words, ["submit.dry_run=true"]))
    check_jobs(asked)
    for sweep in sweeps:
        cells = sweep.cells()
        left = [cell for cell in cells if not cell.trained]
        print(f"# {sweep.name}: {len(cells)} runs of {sweep.steps} steps, {len(left)} to train")
        if left:
            print(shlex.join(["python", "-m", f"train.{sweep.config.command}", *sweep.training(left)]))


if __name__ == "__main__":
    use_utf8()
    in_one_sentence(lambda: main(sys.argv[1:]))
