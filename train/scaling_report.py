"""Draw PaLI's joint-scaling figure of a sweep over towers, and write its tables.

    python -m train.scaling_report folder=runs/scaling
    python -m train.scaling_report folder=runs/scaling score=evaluation/vqa/exact_match
    python -m train.scaling_report folder=runs/study/scaling output=docs/scaling

Runs that have not ended, or that differ in more than their towers, are left out and named.
"""

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.command_line import parse as arguments_of
from common.errors import ConfigurationError
from common.files import beside, writes
from common.terminal import use_utf8
from common.values import PATH
from train.entry import in_one_sentence
from train.scaling.figure import draw
from train.scaling.read import Return, Score, Trained, read_sweep, returns


@dataclass
class Options:
    """Draw PaLI's joint-scaling figure of a sweep over towers, and write its tables."""

    folder: str | None = field(default=None, metadata=PATH)
    """Folder of the sweep. Required."""
    score: str = "validation/loss"
    """A `validation/…` of metrics.jsonl, or `evaluation/<objective>/<score>` of evaluation.json. The loss by default.
    """
    output: str | None = field(default=None, metadata=PATH)
    """Beginning of the names of the files: output.png, output.csv (a line per pair of towers), output_returns.csv (a
    line per step to a larger tower). Null by default: <folder>/scaling."""


def main(arguments: Sequence[str]) -> None:
    """Write the figure and the tables. Raises ConfigurationError."""
    options = parse(arguments)
    assert options.folder is not None
    folder, score = Path(options.folder), Score(options.score)
    runs, left_out = read_sweep(folder, score)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    output = Path(options.output) if options.output else folder / "scaling"
    found = returns(runs, score.lower_is_better)
    with writes(f"output={output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
        _write(output.with_name(f"{output.name}.csv"), (run_row(run, score) for run in runs))
        _write(output.with_name(f"{output.name}_returns.csv"), (return_row(one, score) for one in found))
        draw(runs, found, score, output.with_name(f"{output.name}.png"))
    print(f"{len(runs)} pairs of towers: {output}.png, {output}.csv, {output}_returns.csv")


def parse(arguments: Sequence[str]) -> Options:
    """Parse `key=value` words. Raises ConfigurationError for unknown or missing ones."""
    options = arguments_of(arguments, Options)
    if not options.folder:
        raise ConfigurationError("folder is not given; name the folder of a sweep, such as folder=runs/scaling.")
    return options


def run_row(run: Trained, score: Score) -> dict[str, Any]:
    """Return one line of output.csv; units are in the headings."""
    return {
        "vit": run.vit,
        "mt5": run.mt5,
        "vit_parameters": run.vit_parameters,
        "mt5_parameters": run.mt5_parameters,
        "parameters": run.parameters,
        "training_tflop": f"{run.training_tflop:.6g}",
        _with_unit(score.key, score.unit): f"{run.score:.6g}",
        "runs": run.runs,
    }


def return_row(one: Return, score: Score) -> dict[str, Any]:
    """Return one line of output_returns.csv; a gain is positive if the larger tower is better."""
    return {
        "larger_tower": one.tower,
        "from": one.smaller,
        "to": one.larger,
        "beside": one.beside,
        "added_parameters": one.added_parameters,
        _with_unit("gain", score.unit): f"{one.gain:.6g}",
        _with_unit("gain_per_million_parameters", score.unit): f"{one.gain_per_million:.6g}",
    }


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})"


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    lines = list(rows)
    with beside(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    use_utf8()
    in_one_sentence(lambda: main(sys.argv[1:]))
