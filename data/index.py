"""Make the indices of a corpus before a run does, in all processes of a machine or of many.

    python -m data.index root=/data/shards
    mpirun -n 64 python -m data.index root=/data/shards index_folder=/scratch/indices
    python -m data.index root=/data/shards verify=true

A build that is killed goes on where it ended. Only tars that are new or have changed are examined again.
"""

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.launcher import Process, this_process
from common.progress import listening
from common.values import PATH, at_least
from data.fields import check_field_map
from data.shards.build import Job, build_together, open_index
from data.shards.paths import SPLITS, Part, shard_paths
from data.shards.source import ReadOptions, distinct, index_job

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


def jobs(options: Options) -> dict[str, Job]:
    """Return the index to make for each "source split"; raise ConfigurationError where there is none."""
    root = Path(options.root)
    folders = sorted(path.name for path in root.glob("*") if any(path.glob("*.tar")) or any(path.glob("*/*.tar")))
    sources = dict(options.sources) or {name: name for name in folders}
    found: dict[str, Job] = {}
    for source, location in sources.items():
        place = location if "://" in location else os.path.join(options.root, location)
        own = ReadOptions(index_folder=options.index_folder, max_member_mib=options.max_member_mib,
                          fields=options.fields.get(source, {}))  # fmt: skip
        missing: ConfigurationError | None = None
        for split in options.splits:
            try:
                paths = shard_paths(place, split, own.retry_s)
            except ConfigurationError as error:
                missing = missing or error
                continue
            found[f"{source} {split}"] = index_job(place, split, distinct(paths), Part(), own)
        if missing and not any(name.startswith(f"{source} ") for name in found):
            raise missing
    if not found:
        raise ConfigurationError(f"no folder of shards in {options.root}: point root to a corpus, or set sources.")
    return found


def make(name: str, job: Job, options: Options, rank: Process) -> str:
    """Make one index, together with the other ranks, and return a sentence about it."""
    began, processes = time.monotonic(), options.processes or len(os.sched_getaffinity(0))
    if rank.world_size > 1:
        build_together(job, rank.rank, rank.world_size, processes)
        if rank.rank:
            return ""
    index = open_index(job, processes)
    if options.verify and (damaged := index.verify()):
        raise ConfigurationError(f"{index.path} is damaged ({', '.join(damaged)}); remove it, and run this again.")
    broken = sum(bool(note["defect"]) for note in index.notes.values())
    size = os.path.getsize(index.path) / max(1, len(index)) if os.path.exists(index.path) else 0
    return (
        f"{name}: {len(index):,} records in {len(index.names):,} shards"
        f"{f', {broken} of them broken' if broken else ''} ({time.monotonic() - began:.1f} s, {size:.1f} bytes a "
        f"record, fingerprint {index.fingerprint[:12]}): {index.path}"
    )


def main(arguments: Sequence[str]) -> None:
    """Make the index of each source and split below `root` (see Options)."""
    options, rank = parse(arguments, Options), this_process()
    with nullcontext() if rank.rank else listening(_Printer()):
        for name, job in jobs(options).items():
            if line := make(name, job, options, rank):
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
