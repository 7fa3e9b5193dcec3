"""Measure layouts over CPU processes: time, bytes sent, memory, the pipeline's bubble, and checkpoints.

    python -m benchmarks.parallel                                  # all sections but the last two: a few minutes
    python -m benchmarks.parallel sections=[layouts] ranks=[2,4]   # step time, bytes and memory
    python -m benchmarks.parallel sections=[bubble,gathers,checkpoints,save_plans]
    python -m benchmarks.parallel sections=[materialize]           # a 1.5 B model over 4 ranks: needs 12 GiB
    python -m benchmarks.parallel sections=[first_weights]         # the same read from files: needs 20 GiB

All ranks share this machine's cores, so step times compare layouts of one size only and do not predict a cluster.
Byte counts are exact. In the bubble section stages sleep instead of computing, so two cores can run eight stages.
"""

from dataclasses import dataclass, field

from rich.console import Console

from benchmarks.parallel.bubble import bubble
from benchmarks.parallel.checkpoints import checkpoints
from benchmarks.parallel.first_weights import first_weights
from benchmarks.parallel.layouts import LAYOUTS, gathers, layouts
from benchmarks.parallel.materialize import materialize
from benchmarks.parallel.save_plans import save_plans
from common.command_line import parse, run_command
from common.errors import ConfigurationError

SECTIONS = ("layouts", "bubble", "gathers", "checkpoints", "save_plans", "materialize", "first_weights")


@dataclass
class Options:
    """Measure layouts over CPU processes: time, bytes sent, memory, the pipeline's bubble, and checkpoints."""

    sections: list[str] = field(default_factory=lambda: list(SECTIONS[:-2]))
    """Sections to run, of layouts, bubble, gathers, checkpoints, save_plans, materialize and first_weights (the last
    two are off by default: they need 12 and 20 GiB)."""
    ranks: list[int] = field(default_factory=lambda: list(LAYOUTS))
    """World sizes of the layouts section: 2, 4 and 8."""
    repeats: int = 5
    """Timed steps of each layout, after one warm-up step; the table shows the median."""
    csv: str | None = None
    """File for the layouts section's peak memory and bytes of every rank, by kind."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an unknown section or world size."""
        for name, values, choices in (("sections", self.sections, SECTIONS), ("ranks", self.ranks, tuple(LAYOUTS))):
            if unknown := [value for value in values if value not in choices]:
                raise ConfigurationError(f"{name}={unknown[0]} is unknown; choose from {', '.join(map(str, choices))}.")


def main(options: Options) -> None:
    """Run the chosen sections, each printing its table."""
    console = Console(width=170)
    if "layouts" in options.sections:
        layouts(console, options.ranks, options.repeats, options.csv)
    if "bubble" in options.sections:
        bubble(console)
    if "gathers" in options.sections:
        gathers(console, options.repeats)
    if "checkpoints" in options.sections:
        checkpoints(console)
    if "save_plans" in options.sections:
        save_plans(console)
    if "materialize" in options.sections:
        materialize(console)
    if "first_weights" in options.sections:
        first_weights(console)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
