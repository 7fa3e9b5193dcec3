"""Make the miniature corpus, in one process or by MPI ranks.

python -m data.miniature folder=runs/corpus seed=0
"""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from common.errors import ConfigurationError
from common.launcher import is_main_rank
from common.terminal import use_utf8
from data.miniature.config import parse
from data.miniature.corpus import make_corpus
from data.ranks import Ranks, ranks


def main(arguments: list[str]) -> int:
    """Make the corpus and return the exit code: 0, 2 after a user's mistake, or 3 where it cannot be written."""
    use_utf8()
    try:
        with ranks() as together:
            summary = make(arguments, together)
    except ConfigurationError as error:
        if is_main_rank():
            print(f"Configuration: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written to; ranks of MPI are aborted with it
        print(
            f"{error.filename or 'The corpus'}: {error.strerror or error}; make room, or choose another folder.",
            file=sys.stderr,
        )
        return 3
    if together.rank == 0:
        print(summary)
    return 0


def make(arguments: list[str], together: Ranks) -> str:
    """Make the corpus and return a sentence about it. A collective of `together`."""
    config = parse(arguments)
    start = time.monotonic()
    columns = TextColumn("records"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True, disable=together.rank > 0) as display:
        task = display.add_task("records", total=None)
        printed = 0  # tenths

        def show(done: int, total: int) -> None:
            nonlocal printed
            display.update(task, completed=done, total=total)
            if not display.console.is_terminal and 10 * done // total > printed and together.rank == 0:
                printed = 10 * done // total
                print(f"{config.folder}: {done:,} of {total:,} records, {time.monotonic() - start:.0f} s", flush=True)

        made = make_corpus(config, show, together)
    seconds = time.monotonic() - start
    by = f" by {together.size} ranks" if together.size > 1 else ""
    return f"{config.folder}: " + (f"made in {seconds:.0f} s{by}" if made else "the same corpus is there already")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
