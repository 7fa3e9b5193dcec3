"""Build a corpus from downloads, in one process or by MPI ranks.

    python -m data.corpus.build config=corpus.yaml
    mpirun -n 8 python -m data.corpus.build config=corpus.yaml

Killed at any moment, the same command continues; the bytes of the shards do not depend on it, nor on the ranks.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import (
    EXIT_CONFIGURATION,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    ConfigurationError,
    ReadingStopped,
    RunStopped,
    StorageFailed,
)
from common.launcher import is_main_rank
from common.terminal import use_utf8
from data.corpus.card.counts import Counts
from data.corpus.card.page import write_card
from data.corpus.config import BuildConfig, parse
from data.corpus.stages import annotate, compare, read, write
from data.corpus.stages.plan import Plan, complete, lock, prepare
from data.corpus.stages.work import each, first
from data.error_budget import Ledger
from data.ranks import Ranks, ranks
from data.shards.source import ShardSource


def build(config: BuildConfig, together: Ranks) -> str:
    """Build the corpus and return a sentence about it. A collective of `together`, which share a file system."""
    held = None

    def lock_folder() -> None:
        nonlocal held
        held = lock(Path(config.folder))

    try:
        first(together, lock_folder)
        start = time.monotonic()
        plan = prepare(config, together)
        if plan is None:
            return f"{config.folder}: the same corpus is there already"
        made = make(plan)
        seconds = time.monotonic() - start
        by = f" by {together.size} ranks" if together.size > 1 else ""
        return f"{config.folder}: {made}, in {seconds:.0f} s{by}; open {config.folder}/card.html"
    finally:
        if held is not None:
            held.release()  # type: ignore[unreachable]


def make(plan: Plan) -> str:
    """Run all stages, and return the numbers of rows. A collective of the plan's ranks."""
    ranks, end, claims = plan.ranks, plan.evaluation_end, plan.claims
    each(ranks, "read", plan.paths("rows"), lambda task, path: read.read_part(plan, task, path), claims)
    partitions = [plan.path("edges", number) for number in range(plan.config.duplicates.partitions)]
    each(ranks, "compare", partitions, lambda task, path: compare.compare_partition(plan, task, path), claims)
    least: dict[str, int] = {}
    if plan.config.similarity.scorer:
        scores = plan.paths("scores", end)
        each(ranks, "select", scores, lambda task, path: compare.count_scores(plan, end + task, path), claims)
        least = first(ranks, lambda: compare.thresholds(plan))
    first(ranks, lambda: annotate.prepare_tables(plan))
    labels = first(ranks, lambda: annotate.source_labels(plan))
    records = plan.paths("records", end)
    each(
        ranks,
        "annotate",
        records,
        lambda task, path: annotate.annotate_part(plan, end + task, path, least, labels),
        claims,
    )
    shards = first(ranks, lambda: write.shards(plan))
    paths = [plan.folder / shard.name for shard in shards]
    each(ranks, "write", paths, lambda task, path: write.write(plan, shards[task], path), claims)
    return first(ranks, lambda: _finish(plan, shards))


def _finish(plan: Plan, shards: Sequence[write.Shard]) -> str:
    total: dict[str, Counts] = {}
    for number in range(plan.evaluation_end, len(plan.parts)):
        total.setdefault(plan.source(number), Counts()).add(Counts.from_plain(write.read_counts(plan, number)))
    for source, split in sorted({(shard.source, shard.split) for shard in shards}):
        ShardSource(source, str(plan.folder / source), split, Ledger(1.0, 1))  # it makes the index
    write_card(plan, total, len(shards))
    complete(plan)
    rows, kept = (sum(getattr(one, name) for one in total.values()) for name in ("rows", "kept"))
    return f"{kept:,} of {rows:,} rows are kept, in {len(shards):,} shards"


def main(arguments: Sequence[str]) -> int:
    """Build the corpus and return the exit code: 0, 2 after a user's mistake, 3 or 75 where it cannot go on."""
    use_utf8()
    try:
        with ranks() as together:
            summary = build(parse(arguments), together)
    except ConfigurationError as error:
        return _ended(f"Configuration: {error}", EXIT_CONFIGURATION)
    except (ReadingStopped, RunStopped) as error:
        return _ended(str(error), EXIT_INTERRUPTED if isinstance(error, StorageFailed) else EXIT_STOPPED)
    if together.rank == 0:
        print(summary)
    return 0


def _ended(message: str, code: int) -> int:
    if is_main_rank():
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
