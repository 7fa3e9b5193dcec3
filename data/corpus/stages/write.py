"""Write the shards: each holds a run of the kept records of a source and split. Stage 5."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import RunStopped
from data.corpus.row import no_image
from data.corpus.stages.plan import Plan
from data.shards.writer import write_shard
from data.skip import Skip


@dataclass(frozen=True)
class Shard:
    """Name a shard and its records: (part, first, last) of the parts' kept records."""

    source: str
    split: str
    index: int
    runs: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        """Return the shard's path below the folder of the corpus."""
        return f"{self.source}/{self.split}-{self.index:05d}.tar"


def shards(plan: Plan) -> list[Shard]:
    """Return the shards of the corpus: kept records in the order of parts, `shard_records` of each source and split."""
    runs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number in range(plan.evaluation_end, len(plan.parts)):
        kept = read_counts(plan, number)["kept"]
        runs.setdefault((plan.source(number), plan.input(number).split), []).append((number, kept))
    found = []
    for (source, split), own in sorted(runs.items()):
        for index, run in enumerate(_cut(own, plan.config.shard_records)):
            found.append(Shard(source, split, index, tuple(run)))
    return found


def read_counts(plan: Plan, number: int) -> dict[str, Any]:
    """Return the counts of a part."""
    with open(plan.path("records", number), encoding="utf-8") as lines:
        found: dict[str, Any] = json.loads(next(lines))["counts"]
    return found


def write(plan: Plan, shard: Shard, path: Path) -> None:
    """Write a shard to a path. Raises RunStopped where an input changed since it was read."""
    samples = (one for run in shard.runs for one in _samples(plan, *run))
    write_shard(path, samples)


def _samples(plan: Plan, number: int, first: int, last: int) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    part = plan.parts[number]
    rows = enumerate(plan.readers[part.input].rows(part, Counter()))
    with open(plan.path("records", number), encoding="utf-8") as lines:
        for text in islice(lines, 1 + first, 1 + last):
            line = json.loads(text)
            row = next((row for place, row in rows if place == line["place"]), None)
            if row is None or row.id != line["record"]["id"]:
                raise RunStopped(_changed(part.file, line["place"]))
            try:
                content = None if row.image is no_image else row.image()
            except Skip as skip:
                raise RunStopped(_changed(part.file, line["place"])) from skip
            yield line["key"], line["record"], content


def _changed(file: str, place: int) -> str:
    return f"{file} changed while the corpus was built (row {place}); start again with another folder."


def _cut(runs: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut runs of (part, number of records) into lists that hold `size` records each, the last one fewer."""
    own: list[tuple[int, int, int]] = []
    room = size
    for number, kept in runs:
        first = 0
        while first < kept:
            last = min(kept, first + room)
            own.append((number, first, last))
            room -= last - first
            first = last
            if not room:
                yield own
                own, room = [], size
    if own:
        yield own
