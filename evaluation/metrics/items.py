"""Match predictions with references by id, and hold a score with the scores of its items.

Official scorers differ about ids without a prediction: COCO's and SQuAD's stop or score 0, VQA's stops, others score
what they find. Here such an item scores as an empty prediction and is counted, so that leaving out the difficult
questions never raises a score.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Predictions = Mapping[str, str]
References = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Counts:
    """Count the items that a score is made of, and the ids that do not match."""

    scored: int
    without_prediction: int = 0
    """Scored as an empty prediction."""
    without_references: int = 0
    """Left out: there is nothing to compare a prediction with."""
    unasked: int = 0
    """Predictions for ids that the references do not have: left out."""


@dataclass(frozen=True)
class Score:
    """Hold the score of a metric over all items, and each item's own where the metric has one."""

    value: float
    counts: Counts
    by_id: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Matched:
    """Hold predictions and references of the items that are scored, in the order of the references."""

    ids: list[str]
    predictions: list[str]
    references: list[Sequence[str]]
    counts: Counts


def match(predictions: Predictions, references: References) -> Matched:
    """Return predictions and references of each id that has references, in the order of `references`.

    Raises ValueError where no id has references.
    """
    ids = [id_ for id_, own in references.items() if own]
    if not ids:
        raise ValueError("no item has references")
    counts = Counts(
        scored=len(ids),
        without_prediction=sum(id_ not in predictions for id_ in ids),
        without_references=len(references) - len(ids),
        unasked=sum(id_ not in references for id_ in predictions),
    )
    return Matched(ids, [predictions.get(id_, "") for id_ in ids], [references[id_] for id_ in ids], counts)


def mean_score(
    predictions: Predictions, references: References, score_item: Callable[[str, Sequence[str]], float]
) -> Score:
    """Return the mean of `score_item(prediction, references)` over all ids that have references."""
    matched = match(predictions, references)
    return averaged(matched, map(score_item, matched.predictions, matched.references))


def averaged(matched: Matched, scores: Iterable[float]) -> Score:
    """Return the mean of the items' scores, which are in the order of `matched.ids`."""
    by_id = dict(zip(matched.ids, scores, strict=True))
    return Score(sum(by_id.values()) / len(by_id), matched.counts, by_id)
