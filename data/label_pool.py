"""The labels that a source uses: what is not in a picture is drawn from them where its record names nothing absent."""

from collections import Counter

import numpy as np

from common.progress import beat
from data import fields
from data.objectives.base import Skip, one_record
from data.shards.source import ShardSource

LOOKED_AT = 1_000  # records, spread over the source
MOST = 2_000  # labels; of free text, those used most often


def labels_of(source: ShardSource) -> list[str]:
    """Return the labels of the source's objects, those used most first: a pure function of the source."""
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
    """Return whether negatives for the objects of a record come from elsewhere; a malformed field names something.

    It judges as `fields.absent_labels` does: were `[null]` taken for names, the example would depend on whether another
    record had its labels learned before.
    """
    absent = record.get("absent_labels")
    nothing = all(each is None for each in absent) if isinstance(absent, list) else absent is None
    return nothing and bool(record.get("objects"))
