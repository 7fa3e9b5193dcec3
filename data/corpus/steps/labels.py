"""Draw absent labels for records of objects that name none: random labels of the source that are not in the image.

The paper draws negatives so for data sets without verified ones (appendix A.2). The draw depends on the record's id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import fields
from data.corpus.steps.hashes import digest


def labels(record: Mapping[str, Any]) -> set[str]:
    """Return the labels of a record's objects."""
    return {each.label for each in fields.objects(record, boxes=False)}


def add_negatives(record: dict[str, Any], identifier: str, every: Sequence[str], number: int) -> int:
    """Add `absent_labels` to a record with objects and without negatives; return their number.

    `every`: the labels of the source, sorted.
    """
    if not number or record.get("absent_labels") or not record.get("objects"):
        return 0
    rng = np.random.default_rng(digest("negatives", identifier))
    present = labels(record)
    drawn = rng.permutation(len(every))[: number + len(present)]
    record["absent_labels"] = [every[each] for each in drawn if every[each] not in present][:number]
    return len(record["absent_labels"])
