"""`python -m data.miniature folder=runs/corpus seed=0` makes the miniature corpus."""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.miniature.config import parse
from data.miniature.corpus import make_corpus
from errors import ConfigurationError


def main(arguments: list[str]) -> int:
    """Makes the corpus and returns the exit code: 0, or 2 after a user's mistake."""
    try:
        config = parse(arguments)
        start = time.monotonic()
        columns = TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, transient=True) as display:
            task = display.add_task("records", total=None)
            made = make_corpus(config, lambda done, total: display.update(task, completed=done, total=total))
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    print(f"{config.folder}: " + (f"made in {seconds:.0f} s" if made else "the same corpus is there already"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
