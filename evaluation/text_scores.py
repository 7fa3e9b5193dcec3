"""Score generated text against references, in [0, 1]; higher is better for all but the error rate."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from data.objectives.split_captioning import UNSPACED

UNSPACED_CHARACTER = re.compile(f"[{''.join(f'{chr(low)}-{chr(high)}' for low, high in UNSPACED)}]")
SENTINEL = re.compile(r"<extra_id_\d+>")


def normalized(text: str) -> str:
    """Return the text without differences of case, Unicode form and spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the normalized prediction equals a normalized reference, else 0."""
    return float(normalized(prediction) in {normalized(reference) for reference in references})


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return min(1, matching references / 3), as big_vision's VQAv2 evaluator; exact match with one reference."""
    matches = sum(normalized(prediction) == normalized(reference) for reference in references)
    return min(1.0, matches / min(3, len(references))) if references else 0.0


def character_error_rate(prediction: str, reference: str) -> float:
    """Return the edit distance in characters over the length of the reference, at most 1."""
    hypothesis, target = normalized(prediction), normalized(reference)
    if not target:
        return float(bool(hypothesis))
    return min(1.0, edit_distance(hypothesis, target) / len(target))


def edit_distance(a: str, b: str) -> int:
    """Return the least insertions, deletions and substitutions that turn `a` into `b` (Levenshtein)."""
    return Levenshtein.distance(a, b)


def tokens(text: str) -> list[str]:
    """Split a text into words without punctuation; each character of an unspaced script is a token.

    Sentinels are left out: every prediction of span corruption has the same ones between its spans.
    """
    spaced = UNSPACED_CHARACTER.sub(lambda match: f" {match.group()} ", SENTINEL.sub(" ", normalized(text)))
    words = ("".join(c for c in word if unicodedata.category(c)[0] in "LMN") for word in spaced.split())
    return [word for word in words if word]


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return F1 of the bags of tokens, against the closest reference (SQuAD's F1)."""
    return max((_bag_f1(tokens(prediction), tokens(reference)) for reference in references), default=0.0)


def set_f1(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """Return F1 of two sets of labels, for predictions that list objects."""
    a, b = {normalized(x) for x in predicted}, {normalized(x) for x in reference}
    return 2.0 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def _bag_f1(a: list[str], b: list[str]) -> float:
    if not a or not b:
        return float(a == b)
    return 2.0 * sum((Counter(a) & Counter(b)).values()) / (len(a) + len(b))
