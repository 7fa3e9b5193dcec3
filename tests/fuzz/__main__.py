"""Run cases by hand: `python -m tests.fuzz minutes=30`, or `cases=2000`, `kind=settings`, `seed=7`, `first=123`."""

import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from tests.fuzz.cases import KINDS, Corpus, fails


@dataclass
class Options:
    """Cases to run, until the time is over or all have run."""

    minutes: float = 30.0
    """Longest duration."""
    cases: int = 2000
    """Number of cases."""
    kind: str = "all"
    """Kind of cases: shards, settings, processes or all."""
    seed: int = 1
    first: int = 0
    """Number of the first case; a failed case is printed with the number that runs it again."""


def main(arguments: Sequence[str]) -> int:
    """Run cases, print the failed ones and how many ended how; return the exit code."""
    options = parse(arguments, Options)
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    # A case of processes takes as long as twenty others -> no more than twenty of them, unless no other kind is left.
    others = [kind for kind in kinds if kind != "processes"] or kinds
    if unknown := set(kinds) - set(KINDS):
        raise ConfigurationError(f"kind={unknown.pop()} is unknown; choose one of all, {', '.join(KINDS)}.")
    until, ended, failed = time.monotonic() + 60 * options.minutes, Counter[str](), 0
    with tempfile.TemporaryDirectory() as scratch, quiet():
        corpus = Corpus(Path(scratch))
        for number in range(options.first, options.first + options.cases):
            drawn = kinds if number < options.first + 20 * len(kinds) else others
            kind = drawn[number % len(drawn)]
            if time.monotonic() > until:
                break
            folder = Path(scratch, "case")
            how, problem = fails(kind, options.seed, number, folder, corpus)
            ended[f"{kind}: {how}"] += 1
            if problem is not None:
                failed += 1
                print(f"kind={kind} seed={options.seed} first={number} cases=1: {problem}\n", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    for how, count in sorted(ended.items()):
        print(f"{count:6} {how}")
    print(f"{ended.total() - failed} passed, {failed} failed")
    return int(failed > 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Log nothing: the log lines of skipped records are read by nobody."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    run_command(lambda words: sys.exit(main(words)))
