"""Compute the scores of `evaluation.json`: by objective and language, each with its score on blank images."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from data import objectives
from evaluation.box_scores import box_matches
from evaluation.language_id import LanguageIdentifier
from evaluation.sample_sheet import Sample
from evaluation.text_scores import edit_distance, exact_match, normalized, set_f1, token_f1, vqa_accuracy

# The score of one example: (points earned, points possible). The score of many examples is the ratio of the two sums.
Points = tuple[float, float]
Scorer = Callable[[str, Sequence[str]], dict[str, Points]]


def _answer(prediction: str, references: Sequence[str]) -> dict[str, Points]:
    return {
        "exact_match": (exact_match(prediction, references), 1),
        "vqa_accuracy": (vqa_accuracy(prediction, references), 1),
    }


def _labels(prediction: str, references: Sequence[str]) -> dict[str, Points]:
    read = objectives.load("object_vqa").read
    return {
        "exact_match": (exact_match(prediction, references), 1),
        "label_f1": (max(set_f1(read(prediction), read(reference)) for reference in references), 1),
    }


def _text(prediction: str, references: Sequence[str]) -> dict[str, Points]:
    return {"token_f1": (token_f1(prediction, references), 1)}


def _characters(prediction: str, references: Sequence[str]) -> dict[str, Points]:
    """Return the edits, at most one per character of the reference: one endless prediction must not hide the others."""
    target = normalized(references[0])
    errors = min(edit_distance(normalized(prediction), target), len(target))
    return {"character_error_rate": (errors, len(target)), "exact_match": (exact_match(prediction, references), 1)}


def _boxes(prediction: str, references: Sequence[str]) -> dict[str, Points]:
    predicted, reference = (
        [(box.label, tuple(box)[:4]) for box in objectives.load("detection").read(text)]
        for text in (prediction, references[0])
    )
    return {"box_f1": (2 * box_matches(predicted, reference), len(predicted) + len(reference))}


SCORERS: dict[str, Scorer] = {  # by objective; token F1 for any other
    "span_corruption": _text,
    "split_captioning": _text,
    "captioning": _text,
    "ocr": _characters,
    "vqa": _answer,
    "vqg": _text,
    "object_vqa": _labels,
    "detection": _boxes,
}
RESAMPLES = 1000  # of an interval: its ends vary by a few percent of its width
# Objectives whose prediction must be in the language that the prompt names.
IN_ASKED_LANGUAGE = ("split_captioning", "captioning", "vqg")


def evaluation(samples: Sequence[Sample], by: str = "objective") -> dict[str, Any]:
    """Return {objective: {examples, <score>: {score, blind, low, high}, languages: {code: the same}}}.

    `by` names the keys: by `component`, two components of one objective have scores of their own.

    `blind` is the score of predictions on a blank image (`blind_predictions`), null where none was made. `low` and
    `high` are the score's 95 % interval (`interval`). `asked_language` is the share of predictions in the
    language of the prompt (`evaluation.language_id` learns the languages from the references);
    `references_in_asked_language`, the same share of the references, shows how reliable it is.
    """
    result: dict[str, Any] = {}
    for name in dict.fromkeys(getattr(sample, by) for sample in samples):
        own = [sample for sample in samples if getattr(sample, by) == name]
        objective = own[0].objective
        identify = LanguageIdentifier((s.language, r) for s in own for r in s.references)
        result[name] = _scores(own, objective, identify)
        languages = sorted({sample.language for sample in own})
        result[name]["languages"] = {
            language: _scores([s for s in own if s.language == language], objective, identify) for language in languages
        }
    return result


def _scores(samples: Sequence[Sample], objective: str, identify: LanguageIdentifier) -> dict[str, Any]:
    seen = _by_name([_points(s, s.prediction, objective, identify) for s in samples])
    unseen = ((s, text) for s, text in zip(samples, blind_predictions(samples), strict=True) if text is not None)
    blind = _by_name([_points(s, text, objective, identify) for s, text in unseen])
    records = [(s.source, s.key) for s in samples]
    scores: dict[str, Any] = {"examples": len(samples)}
    for name, points in seen.items():
        low, high = interval(points, records)
        without = _ratio(blind[name]) if name in blind else None
        scores[name] = {"score": _ratio(points), "blind": without, "low": low, "high": high}
    if objective in IN_ASKED_LANGUAGE:
        own = [identify(s.references[0]) == s.language for s in samples]
        scores["references_in_asked_language"] = sum(own) / len(own)
    return scores


def blind_predictions(samples: Sequence[Sample]) -> list[str | None]:
    """Return each sample's prediction on a blank image; None where none was made.

    Of an example without an image, a blank one shows nothing. It has the target of the next example of its language:
    what is right without a look at the input. The only one of its language has none.
    """
    following = {sample.language: sample.references[0] for sample in reversed(samples)}  # the first one's, of the last
    counts = Counter(sample.language for sample in samples)
    found: list[str | None] = [None] * len(samples)
    for number in reversed(range(len(samples))):
        sample = samples[number]
        found[number] = sample.blind_prediction
        if sample.blind_prediction is not None and not sample.has_image:
            found[number] = following[sample.language] if counts[sample.language] > 1 else None
        following[sample.language] = sample.references[0]
    return found


def _points(sample: Sample, prediction: str, objective: str, identify: LanguageIdentifier) -> dict[str, Points]:
    points = SCORERS.get(objective, _text)(prediction, sample.references)
    if objective in IN_ASKED_LANGUAGE:
        points["asked_language"] = (float(identify(prediction) == sample.language), 1)
    return points


def _by_name(points: Sequence[dict[str, Points]]) -> dict[str, list[Points]]:
    """Return the points of each score, over the examples."""
    return {name: [each[name] for each in points] for name in (points[0] if points else ())}


def _ratio(points: Sequence[Points]) -> float | None:
    """Return points earned / points possible; None where no point was possible."""
    possible = sum(whole for _, whole in points)
    return sum(part for part, _ in points) / possible if possible else None


def interval(points: Sequence[Points], records: Sequence[Any]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a score, by a bootstrap over records; (None, None) where it has no score.

    `records`: of each example. Examples of one record are drawn together, because they are not independent: those of
    one image are right or wrong together. The interval holds the middle 95 % of RESAMPLES draws, of a fixed seed.
    """
    if not points:
        return None, None
    number = {record: row for row, record in enumerate(dict.fromkeys(records))}
    sums = np.zeros((len(number), 2))
    np.add.at(sums, [number[record] for record in records], np.array(points, dtype=np.float64).reshape(-1, 2))
    drawn = _draws(len(sums)) @ sums
    ratios = drawn[drawn[:, 1] > 0, 0] / drawn[drawn[:, 1] > 0, 1]
    if not len(ratios):
        return None, None
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(low), float(high)


@cache
def _draws(number: int) -> np.ndarray:
    """Return how often each of `number` records is in each resample, [RESAMPLES, number]."""
    return np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
