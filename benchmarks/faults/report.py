"""Results as a table on the terminal and in Markdown."""

import os
from pathlib import Path

from rich.table import Table

from benchmarks.faults.trial import Result

HEAD = ("fault", "what happened", "seconds to detect", "seconds until training again", "steps lost",
        "loss curve equal", "survived")  # fmt: skip


def table(results: list[Result]) -> Table:
    """Make the terminal's table."""
    shown = Table(title="What faults do to a run of two ranks")
    for name in HEAD:
        shown.add_column(name, justify="left" if name in HEAD[:2] else "right")
    for result in results:
        shown.add_row(*cells(result))
    return shown


def cells(result: Result) -> tuple[str, ...]:
    """Return a result's row, in the order of HEAD."""
    seconds = ["–" if s is None else f"{s:.1f} s" for s in (result.detected_s, result.training_again_s)]
    lost = "–" if result.steps_lost is None else str(result.steps_lost)
    equal = "–" if result.equal is None else "yes" if result.equal else "NO"
    survived = "not run" if result.happened.startswith("not run") else "yes" if result.survived else "NO"
    return result.fault, result.happened, *seconds, lost, equal, survived


def write_report(text: str, results: list[Result], path: Path) -> None:
    """Write `text` and the table in Markdown, with the command that makes them."""
    rows = [HEAD, ("---",) * len(HEAD), *map(cells, results)]
    load = f"{os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}"
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    measured = f"Measured with `python -m benchmarks.faults report={path}` on {load}:"
    path.write_text(f"# Faults\n\n{text.strip()}\n\n{measured}\n\n{lines}\n", encoding="utf-8")
