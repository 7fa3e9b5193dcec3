"""Collect the labels of a source: negatives of a record that names no absent labels are drawn from them."""

from collections import Counter

import numpy as np

from common.progress import beat
from data import fields
from data.shards.source import ShardSource
from data.skip import Skip, one_record

LOOKED_AT = 1_000  # records, spread over the source
MOST = 2_000  # labels, the most frequent ones: a source of free text has very many


def distinct_labels(source: ShardSource) -> list[str]:
    """Return the labels of the source's objects, the most frequent first: a pure function of the source."""
    counts: Counter[str] = Counter()
    numbers = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source)), dtype=np.int64)
    for number in numbers.tolist():
        beat()
        try:
            with one_record("its labels"):
                counts.update({each.label for each in fields.objects(source[number].fields, boxes=False)})
        except Skip:  # counted where it is used
            continue
    return sorted(counts, key=lambda label: (-counts[label], label))[:MOST]


def names_nothing_absent(record: fields.Fields) -> bool:
    """Return whether a record with objects has no absent labels, so that its negatives come from the source's labels.

    A malformed field counts as labels. `[null]` counts as none, as in `fields.absent_labels`: otherwise the example
    would depend on whether an earlier record had the labels collected.
    """
    absent = record.get("absent_labels")
    nothing = all(each is None for each in absent) if isinstance(absent, list) else absent is None
    return nothing and bool(record.get("objects"))
