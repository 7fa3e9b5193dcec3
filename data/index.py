"""Make the indices of a corpus before a run does, in all processes of a machine or of many.

    python -m data.index root=/data/shards
    mpirun -n 64 python -m data.index root=/data/shards index_folder=/scratch/indices
    python -m data.index root=/data/shards verify=true

A build that is killed goes on where it ended. Only tars that are new or have changed are examined again. The
line of each index is followed by what the source holds: records by field and language, broken shards, names that no
field reads.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.launcher import Process, this_process
from common.progress import listening
from common.values import PATH, at_least
from data.error_budget import Ledger
from data.fields import check_field_map
from data.shards.build import Job, build_together, open_index
from data.shards.field_map import check_places, check_sources
from data.shards.paths import SPLITS, Part, locations, shard_paths
from data.shards.source import ReadOptions, ShardSource, distinct, index_job
from data.shards.summary import summary

PRINT_EVERY_S = 10.0


@dataclass
class Options:
    """Hold the options of `python -m data.index key=value …`."""

    root: str = field(default="runs/corpus", metadata=PATH)
    """Corpus: a folder of sources."""
    sources: dict[str, str] = field(default_factory=dict, metadata=PATH)
    """Location by name of a source, as `data.sources`. Empty by default: each folder of `root` that holds tars."""
    splits: list[str] = field(default_factory=lambda: [*SPLITS])
    """Splits that are indexed, where a source has them. All by default."""
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    """Names of fields by source, as `data.fields`; they must be those of the run."""
    index_folder: str | None = field(default=None, metadata=PATH)
    """Folder of the indices, as `data.index_folder`. Null by default: beside the tars."""
    max_member_mib: int = 64
    """Largest file that is read (MiB), as `data.max_member_mib`."""
    processes: int = 0
    """Processes of each rank. 0 by default: one for each core that this process may use."""
    verify: bool = False
    """Compare the bytes of every index with their checksums. False by default: it reads all of them."""

    def __post_init__(self) -> None:
        at_least("", 1, max_member_mib=self.max_member_mib)
        at_least("", 0, processes=self.processes)
        for source, own in self.fields.items():
            check_field_map(f"fields.{source}", own)


@dataclass(frozen=True)
class Task:
    """Name a split of a source, and the index to make for it."""

    source: str
    location: str
    split: str
    options: ReadOptions
    job: Job


def tasks(options: Options) -> list[Task]:
    """Return the indices to make; raise ConfigurationError where there is none."""
    sources = locations(options.root, options.sources)
    check_sources(options.fields, sources, "fields")
    found: list[Task] = []
    for source, place in sources.items():
        own = ReadOptions(index_folder=options.index_folder, max_member_mib=options.max_member_mib,
                          fields=options.fields.get(source, {}))  # fmt: skip
        missing: ConfigurationError | None = None
        for split in options.splits:
            try:
                paths = shard_paths(place, split, own.retry_s)
            except ConfigurationError as error:
                missing = missing or error
                continue
            found.append(Task(source, place, split, own, index_job(place, split, distinct(paths), Part(), own)))
        if missing and not any(task.source == source for task in found):
            raise missing
    return found


def make(task: Task, options: Options, rank: Process) -> list[str]:
    """Make one index, together with the other ranks, and return lines about it and the source."""
    began, processes, job = time.monotonic(), options.processes or len(os.sched_getaffinity(0)), task.job
    if rank.world_size > 1:
        build_together(job, rank.rank, rank.world_size, processes)
        if rank.rank:
            return []
    index = open_index(job, processes)
    if options.verify and (damaged := index.verify()):
        raise ConfigurationError(f"{index.path} is damaged ({', '.join(damaged)}); remove it, and run this again.")
    broken = sum(bool(note["defect"]) for note in index.notes.values())
    size = os.path.getsize(index.path) / max(1, len(index)) if os.path.exists(index.path) else 0
    line = (
        f"{task.source} {task.split}: {len(index):,} records in {len(index.names):,} shards"
        f"{f', {broken} of them broken' if broken else ''} ({time.monotonic() - began:.1f} s, {size:.1f} bytes a "
        f"record, fingerprint {index.fingerprint[:12]}): {index.path}"
    )
    if not len(index):
        return [line]
    ledger = Ledger(1.0, 0)
    with ledger.muted():  # the summary names what is broken
        source = ShardSource(task.source, task.location, task.split, ledger, task.options, index)
    if task.split == "train":
        check_places(source, f"fields.{task.source}")
    return [line, *summary(source)]


def main(arguments: Sequence[str]) -> None:
    """Make the index of each source and split below `root` (see Options)."""
    options, rank = parse(arguments, Options), this_process()
    with nullcontext() if rank.rank else listening(_Printer()):
        for task in tasks(options):
            for line in make(task, options, rank):
                print(line, flush=True)


class _Printer:
    """Print what is being done, at most every PRINT_EVERY_S."""

    def __init__(self) -> None:
        self._printed = time.monotonic()

    def __call__(self, activity: str) -> None:
        if activity and time.monotonic() - self._printed > PRINT_EVERY_S:
            self._printed = time.monotonic()
            print(f"  {activity}", flush=True)


if __name__ == "__main__":
    run_command(main)
