"""Scores of generated text against references. All lie in [0, 1]; all but the error rate are better when higher."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)  # Thai, Lao, Burmese, Khmer, Japanese kana, Chinese characters: written without spaces between words
SENTINEL = re.compile(r"<extra_id_\d+>")
IOU_MATCH = 0.5  # detection counts a box as found from this overlap on (PASCAL VOC's criterion)

Box = Sequence[float]  # ymin, xmin, ymax, xmax


def normalized(text: str) -> str:
    """Case, Unicode form and spaces that do not matter taken away."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference, up to case, Unicode form and spaces."""
    return float(normalized(prediction) in {normalized(reference) for reference in references})


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """min(1, matching references / 3), as big_vision's VQAv2 evaluator; with one reference, exact match."""
    matches = sum(normalized(prediction) == normalized(reference) for reference in references)
    return min(1.0, matches / min(3, len(references))) if references else 0.0


def character_error_rate(prediction: str, reference: str) -> float:
    """Edit distance in characters over the length of the reference, at most 1."""
    hypothesis, target = normalized(prediction), normalized(reference)
    if not target:
        return float(bool(hypothesis))
    return min(1.0, edit_distance(hypothesis, target) / len(target))


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of characters that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def tokens(text: str) -> list[str]:
    """Words without punctuation; each character of an unspaced script is a token of its own.

    Sentinels, which stand between the spans of span corruption, are no words: every answer has the same ones.
    """
    spaced = UNSPACED.sub(lambda match: f" {match.group()} ", SENTINEL.sub(" ", normalized(text)))
    words = ("".join(c for c in word if unicodedata.category(c)[0] in "LMN") for word in spaced.split())
    return [word for word in words if word]


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of the bags of tokens, against the closest reference (SQuAD's F1)."""
    return max((_bag_f1(tokens(prediction), tokens(reference)) for reference in references), default=0.0)


def _bag_f1(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    return 2.0 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))


def box_matches(
    predicted: Sequence[tuple[str, Box]], reference: Sequence[tuple[str, Box]], threshold: float = IOU_MATCH
) -> int:
    """How many labelled boxes find one of their label, overlapping by `threshold`; greedy, largest overlap first."""
    pairs = sorted(
        (
            (-intersection_over_union(box, other), i, j)
            for i, (label, box) in enumerate(predicted)
            for j, (name, other) in enumerate(reference)
            if normalized(label) == normalized(name)
        ),
    )
    used_predicted: set[int] = set()
    used_reference: set[int] = set()
    for negative_overlap, i, j in pairs:
        if -negative_overlap >= threshold and i not in used_predicted and j not in used_reference:
            used_predicted.add(i)
            used_reference.add(j)
    return len(used_predicted)


def box_f1(
    predicted: Sequence[tuple[str, Box]], reference: Sequence[tuple[str, Box]], threshold: float = IOU_MATCH
) -> float:
    """2 x matches / (boxes predicted + boxes in the reference); 1 where both are empty."""
    total = len(predicted) + len(reference)
    return 2.0 * box_matches(predicted, reference, threshold) / total if total else 1.0


def intersection_over_union(a: Box, b: Box) -> float:
    """Overlap of two boxes (ymin, xmin, ymax, xmax), in any unit."""
    height = min(a[2], b[2]) - max(a[0], b[0])
    width = min(a[3], b[3]) - max(a[1], b[1])
    if height <= 0 or width <= 0:
        return 0.0
    union = _area(a) + _area(b) - height * width
    return height * width / union


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def set_f1(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two sets of labels, for answers that list objects."""
    a, b = {normalized(x) for x in predicted}, {normalized(x) for x in reference}
    return 2.0 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
