"""Inject faults into real training jobs; each job survives, or ends cleanly and goes on when started again.

    python -m benchmarks.faults                               # all faults: about 20 minutes
    python -m benchmarks.faults names=["SIGSTOP of a rank"]   # some, by parts of their names
    python -m benchmarks.faults names_only=true               # print the names, run none
    python -m benchmarks.faults report=benchmarks/faults/README.md

A job is two ranks of the toy model on CPUs (gloo) that save a checkpoint every 4 of 40 steps. A fault strikes while
the job trains. Where the job ends, the same command is started again. "Loss curve equal" compares each step's loss,
gradient norm and learning rate with those of an undisturbed run, to the last bit. Seconds are wall clock; most of the
time until a job trains again is Python importing torch.
"""

import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.faults.catalog import FAULTS
from benchmarks.faults.report import cells, table, write_report
from benchmarks.faults.runner import make_data, run
from common.command_line import parse, run_command
from common.errors import ConfigurationError


@dataclass
class Options:
    """Inject faults into real training jobs, and compare their loss curves with that of an undisturbed run."""

    names: list[str] = field(default_factory=list)
    """Faults to run, by parts of their names; empty runs all."""
    names_only: bool = False
    """Print the names of the faults, and end."""
    folder: str | None = None
    """Folder for the jobs; null makes a new one, and removes it where every job survives."""
    report: str | None = None
    """Markdown file for the table."""


def main(options: Options) -> int:
    """Run the chosen faults, and return 0 where every job survives, 1 elsewhere."""
    console = Console()
    if options.names_only:
        console.print("\n".join(fault.name for fault in FAULTS), markup=False)
        return 0
    chosen = [fault for fault in FAULTS if not options.names or any(part in fault.name for part in options.names)]
    if not chosen:
        raise ConfigurationError(f"names={options.names} match no fault; see names_only=true.")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="pali-faults-")).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that jobs are ended on the way out
    corpus = make_data(folder / "corpus")
    results = []
    for number, fault in enumerate(chosen):
        console.print(f"{fault.name} …", markup=False)
        results.append(run(fault, folder / f"fault_{number:02d}", corpus))
        console.print("    " + "; ".join(cells(results[-1])[1:]), markup=False)
        if options.report:
            write_report((__doc__ or "").split("\n", 1)[1], results, Path(options.report))
    console.print(table(results))
    survived = all(result.survived for result in results)
    if options.folder is None and survived:
        shutil.rmtree(folder)
    else:
        console.print(f"logs and folders of the jobs: {folder}")
    return 0 if survived else 1


if __name__ == "__main__":
    run_command(lambda words: sys.exit(main(parse(words, Options))))
