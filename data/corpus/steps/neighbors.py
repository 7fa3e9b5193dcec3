"""Find the rows that have an earlier near-duplicate, in sorted entries: bucket by bucket, without all pairs.

An entry is compared with the WINDOW entries before it in its bucket, and with the first FIRST ones. So work is linear
in the number of entries, whatever the sizes of buckets.
"""

import numpy as np
from numpy.typing import NDArray

from data.corpus.steps import features
from data.corpus.steps.hashes import CURATED, EXACT, FEATURE, ID, IMAGE, TEXT, VARIANT, Entries

WINDOW, FIRST = 16, 4
LIMITS = {FEATURE: features.DISTANCE}
# `places` of a vote: 16 bits each of (x, y) in the row's image, and in the other one.
EDGE = np.dtype([("row", "<u8"), ("cause", "u1"), ("other", "<u8"), ("distance", "<u2"), ("places", "<u8")])
# Causes, the one that counts first: a row may have several.
TWICE, TOO_MANY_TEXTS, NEAR_IMAGE, NEAR_TEXT, PART, VOTE = range(6)
CAUSES = (
    "id twice", "too many texts of an image", "near-duplicate image", "near-duplicate document", "part of another image"
)  # fmt: skip
KIND_CAUSES = {ID: TWICE, EXACT: NEAR_IMAGE, IMAGE: NEAR_IMAGE, TEXT: NEAR_TEXT, FEATURE: VOTE}

Edges = NDArray[np.void]


def edges(found: Entries, distances: dict[int, int], evaluation_end: int, max_texts: int) -> Edges:
    """Return one edge for each row with an earlier near-duplicate, and for each row of an image with too many texts.

    Equal features of two images are votes, whose number counts when those of all buckets are together: see `settled`.
    `distances`: bits by kind. Rows below `evaluation_end` are those of evaluation sets: nothing removes them, and they
    come before all others. The result is sorted by row, and depends on the set of entries alone.
    """
    order = np.lexsort((*found["hash"].T, found["flags"], found["row"], found["key"]))
    ordered = found[order]
    if not len(ordered):
        return np.zeros(0, EDGE)
    starts = np.flatnonzero(np.r_[True, ordered["key"][1:] != ordered["key"][:-1]])
    first = np.repeat(starts, np.diff(np.r_[starts, len(ordered)])).astype(np.int64)
    limits = np.array([(distances | LIMITS).get(kind, 0) for kind in range(5)], np.int64)
    made = [_crowded(ordered, first, evaluation_end, max_texts)]
    every = np.arange(len(ordered))
    for apart in range(1, WINDOW + 1):
        later = every[every - apart >= first]
        if not len(later):
            break
        made.append(_compare(ordered, later, later - apart, limits, evaluation_end))
    for place in range(FIRST):
        later = every[every - WINDOW > first + place]
        made.append(_compare(ordered, later, first[later] + place, limits, evaluation_end))
    every_edge = np.concatenate(made)
    votes = np.unique(every_edge[every_edge["cause"] == VOTE])
    joined = np.concatenate([_strongest(every_edge[every_edge["cause"] != VOTE]), votes])
    return joined[np.argsort(joined["row"], kind="stable")]


def settled(found: Edges) -> Edges:
    """Return one edge for each row, of the first cause, to the earliest row: votes that agree are an edge."""
    is_vote = found["cause"] == VOTE
    direct = found[~is_vote]
    votes = found[is_vote & ~np.isin(found["row"], direct["row"])]  # the other rows have a cause already
    return _strongest(np.concatenate([direct, _parts(votes)]))


def _parts(votes: Edges) -> Edges:
    """Return an edge for each pair of images that share a part."""
    if not len(votes):
        return votes
    made = []
    ordered = votes[np.lexsort((votes["other"], votes["row"]))]
    pairs = np.stack([ordered["row"], ordered["other"]], 1)
    starts = np.flatnonzero(np.r_[True, (pairs[1:] != pairs[:-1]).any(1)])
    ends = np.r_[starts[1:], len(ordered)]
    enough = ends - starts >= features.LEAST_VOTES  # most pairs have one vote, by chance
    for start, end in zip(starts[enough], ends[enough], strict=True):
        places = np.ascontiguousarray(ordered["places"][start:end]).view("<u2").reshape(-1, 4)
        if features.agreeing(places) >= features.LEAST_VOTES:
            made.append(pairs[start])
    parts = np.zeros(len(made), EDGE)
    if made:
        parts["row"], parts["other"] = np.stack(made, 1)
        parts["cause"] = PART
    return parts


def _strongest(found: Edges) -> Edges:
    ordered = found[np.lexsort((found["distance"], found["other"], found["cause"], found["row"]))]
    if not len(ordered):
        return ordered
    return ordered[np.r_[True, ordered["row"][1:] != ordered["row"][:-1]]]


def _compare(
    found: Entries, later: NDArray[np.int64], earlier: NDArray[np.int64], limits: NDArray[np.int64], evaluation_end: int
) -> Edges:
    one, other = found[later], found[earlier]
    bits = np.bitwise_count(one["hash"] ^ other["hash"])
    bits[one["kind"] == FEATURE, 2] = 0  # a feature's place
    different = bits.sum(-1).astype(np.int64)
    exact = one["kind"] == EXACT
    near = (different <= limits[one["kind"]]) | exact
    near &= (one["row"] != other["row"]) & (one["kind"] == other["kind"]) & (one["row"] >= evaluation_end)
    near &= (one["flags"] & other["flags"] & VARIANT) == 0
    near &= ((one["flags"] & CURATED) == 0) | (other["row"] < evaluation_end) | (one["kind"] == ID)
    one, other = one[near], other[near]
    made = np.zeros(len(one), EDGE)
    causes = np.array([KIND_CAUSES[kind] for kind in range(5)], np.uint8)
    made["row"], made["cause"], made["other"] = one["row"], causes[one["kind"]], other["row"]
    made["distance"] = np.where(exact[near], 0, different[near])
    is_vote = one["kind"] == FEATURE
    made["places"] = np.where(is_vote, one["hash"][:, 2] | other["hash"][:, 2] << np.uint64(32), 0)
    return made


def _crowded(found: Entries, first: NDArray[np.int64], evaluation_end: int, max_texts: int) -> Edges:
    """Return an edge for each row whose image, byte for byte, has more than `max_texts` distinct texts."""
    own = np.flatnonzero((found["kind"] == EXACT) & (found["row"] >= evaluation_end) & (found["flags"] & CURATED == 0))
    made = np.zeros(0, EDGE)
    if not len(own):
        return made
    pairs = np.unique(np.stack([found["key"][own], found["hash"][own, 0]], 1), axis=0)
    keys, counts = np.unique(pairs[:, 0], return_counts=True)
    crowded = own[np.isin(found["key"][own], keys[counts > max_texts])]
    made = np.zeros(len(crowded), EDGE)
    made["row"], made["cause"], made["other"] = found["row"][crowded], TOO_MANY_TEXTS, found["row"][first[crowded]]
    return made
