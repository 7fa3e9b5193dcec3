"""Score short answers: ANLS of scene text, SQuAD's F1 and exact match, and accuracy of exact answers."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from evaluation.metrics.items import Predictions, References, Score, mean_score

ANLS_THRESHOLD = 0.5  # similarities below it count as 0 (Biten et al. 2019, equation 1)
ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def anls(predictions: Predictions, references: References) -> Score:
    """Return the average normalized Levenshtein similarity (ST-VQA, DocVQA): the best over an item's answers."""
    return mean_score(predictions, references, anls_of_item)


def anls_of_item(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 - edit distance / the longer length for the closest answer, 0 below the threshold."""
    best = max(_similarity(prediction, answer) for answer in answers)
    return best if best >= ANLS_THRESHOLD else 0.0


def _similarity(prediction: str, answer: str) -> float:
    own, other = (" ".join(text.strip().lower().split()) for text in (prediction, answer))
    longer = max(len(own), len(other))
    return 1.0 - Levenshtein.distance(own, other) / longer if longer else 1.0


def squad(predictions: Predictions, references: References) -> dict[str, Score]:
    """Return {"f1", "exact_match"} in [0, 1] by SQuAD's rules, which XQuAD and TyDiQA-GoldP share."""
    return {
        "f1": mean_score(predictions, references, lambda p, r: max(squad_f1(p, answer) for answer in r)),
        "exact_match": mean_score(
            predictions, references, lambda p, r: float(any(squad_text(p) == squad_text(answer) for answer in r))
        ),
    }


def squad_f1(prediction: str, answer: str) -> float:
    """Return F1 of the two bags of words; two answers without words are equal."""
    own, other = squad_text(prediction).split(), squad_text(answer).split()
    if not own or not other:
        return float(own == other)
    return 2.0 * sum((Counter(own) & Counter(other)).values()) / (len(own) + len(other))


def squad_text(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation, English articles and repeated spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


def accuracy(predictions: Predictions, references: References) -> Score:
    """Return the share of predictions that equal a reference but for case and spaces (XNLI, TallyQA, xGQA, MaXM)."""
    return mean_score(predictions, references, lambda p, r: float(_plain(p) in map(_plain, r)))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
