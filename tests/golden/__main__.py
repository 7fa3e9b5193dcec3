"""Compare golden files with newly computed values; write them only where a reason is given.

    python -m tests.golden                                        # all of them; writes nothing
    python -m tests.golden equivalence --because "Adafactor factors matrices of 16 rows"

The reason is kept in the file. Exit code 1 where something differs and was not written.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import zip_longest

from rich.console import Console
from rich.table import Table

from common.files import write_text
from tests.golden import BECAUSE, FILES, Lists, computed, expected, path_of


def differences(old: Lists, new: Lists) -> list[tuple[str, int, object, object]]:
    """List (name, index, old, new) of every value that differs; None for a value that a list lacks."""
    return [
        (name, index, before, after)
        for name in {**old, **new}
        for index, (before, after) in enumerate(zip_longest(old.get(name, []), new.get(name, [])))
        if before != after
    ]


def relative(old: object, new: object) -> str:
    """Return the difference of two numbers relative to the old one, as text; empty for words."""
    if not isinstance(old, int | float) or not isinstance(new, int | float):
        return ""
    return f"{(new - old) / abs(old):+.2e}" if old else "from 0"


def show(name: str, old: Lists, changed: list[tuple[str, int, object, object]]) -> None:
    table = Table(title=f"{path_of(name).name}: {len(changed)} of {sum(map(len, old.values()))} values differ")
    for column in ("list", "number", "old", "new", "relative"):
        table.add_column(column, justify="left" if column == "list" else "right", no_wrap=True)
    for key, index, before, after in changed:
        table.add_row(key, str(index + 1), str(before), str(after), relative(before, after))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write(name: str, new: Lists, reason: str) -> None:
    for values in new.values():
        assert all(math.isfinite(value) for value in values if isinstance(value, float)), "not finite"
    write_text(path_of(name), json.dumps({BECAUSE: reason, **new}, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.golden", description=__doc__.splitlines()[0])  # type: ignore
    parser.add_argument("names", nargs="*", metavar="name", help=f"files, of {', '.join(FILES)}; all if none is named")
    parser.add_argument("--because", help="why the values change: writes them, with this reason")
    options = parser.parse_args(arguments)
    if unknown := sorted({*options.names} - {*FILES}):
        parser.error(f"there is no golden file {unknown[0]!r}; choose one of {', '.join(FILES)}")
    if options.because is not None and not (options.names and options.because.strip()):
        parser.error("--because needs the names of files and a reason; give both")
    left = False
    for name in options.names or FILES:
        old, new = expected(name), computed(name)
        changed = differences(old, new)
        if not changed:
            print(f"{path_of(name).name}: all {sum(map(len, old.values()))} values are the same")
            continue
        show(name, old, changed)
        if options.because is None:
            left = True
        else:
            write(name, new, options.because.strip())
            print(f"{path_of(name).name} is written: {options.because.strip()}")
    return int(left)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
