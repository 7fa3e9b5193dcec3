"""Make random small changes to the core, one at a time, run its tests, and print the changes that no test detects.

    python -m tests.mutants count=60 seed=1
    python -m tests.mutants count=20 seed=2 files=parallel/optimizer/adafactor further=false

A mutant runs in a copy of the checkout, in a process forked from one that has imported torch and other slow packages.
First the unit tests of its folder run: those of its own file, those beside them, the others. If it survives, the other
unit tests that import its file run, and for model and parallel those in worlds of several processes (not with
further=false).
A test detects a mutant if it fails on it twice, the second time alone, and passes without it: a test that fails now
and then, as on a busy machine, detects none.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from tests.mutants.draw import Mutant, draw
from tests.mutants.run import Runner

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    """Settings of a draw of mutants, given as `key=value`."""

    count: int = 60
    """Mutants to draw."""
    seed: int = 1
    files: str = ""
    """Beginning of the paths of the files to change; empty for all."""
    numbers: list[int] = field(default_factory=list)
    """Mutants of the draw to run, by their numbers in the output, such as [8,23]; empty for all."""
    further: bool = True
    """Run tests of other folders too on mutants that survive those of their own."""
    share: float = 95.0
    """Percent of mutants that tests must detect; with fewer the exit code is 1."""


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments, Options)
    chosen = draw(ROOT, options.count, options.seed, options.files)
    if not chosen:
        raise ConfigurationError(
            f"files={options.files} begins no path of the core; give such as parallel/optimizer/adafactor."
        )
    unknown = set(options.numbers) - {*range(1, len(chosen) + 1)}
    if unknown:
        raise ConfigurationError(
            f"numbers={options.numbers} is outside of 1 to {len(chosen)}; give numbers of the draw."
        )
    numbered = [(n, mutant) for n, mutant in enumerate(chosen, start=1) if not options.numbers or n in options.numbers]
    began, outcomes, survivors = time.monotonic(), Counter[str](), []
    with TemporaryDirectory(prefix="mutants-") as folder:
        runner = Runner(ROOT, Path(folder), options.further)
        for number, mutant in numbered:
            killer = runner.reach(mutant)
            outcomes[runner.stage if killer else "survived"] += 1
            survivors += [] if killer else [mutant]
            print(f"{number}/{len(chosen)} {_sentence(mutant)}: {killer or 'SURVIVES'}", flush=True)
    killed = len(numbered) - len(survivors)
    _show(survivors)
    print(
        f"{killed} of {len(numbered)} killed ({killed / len(numbered):.0%}) in {time.monotonic() - began:.0f} s: "
        + ", ".join(f"{number} {stage}" for stage, number in outcomes.most_common())
    )
    return int(100 * killed < options.share * len(numbered))


def _sentence(mutant: Mutant) -> str:
    before, after = (" ".join(text.split()) for text in (mutant.before, mutant.after))
    return f"{mutant.file}:{mutant.line}: {before} -> {after}"


def _show(survivors: Sequence[Mutant]) -> None:
    table = Table(title=f"{len(survivors)} mutants survive", show_lines=True)
    for column in ("where", "before", "after"):
        table.add_column(column, overflow="fold")
    for mutant in survivors:
        table.add_row(f"{mutant.file}:{mutant.line}", mutant.before, mutant.after)
    if survivors:
        Console(width=None if sys.stdout.isatty() else 150, markup=False).print(table)


if __name__ == "__main__":
    run_command(lambda words: sys.exit(main(words)))
