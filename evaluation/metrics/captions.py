"""Score captions by CIDEr-D and BLEU, as pycocoevalcap does."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from evaluation.metrics import ptb
from evaluation.metrics.items import Predictions, References, Score, averaged, match

Tokens = Sequence[str]
Tokenize = Callable[[Sequence[str]], list[list[str]]]
Ngram = tuple[str, ...]

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of CIDEr-D's penalty of length (Vedantam et al. 2015, section 6)
TINY, SMALL = 1e-15, 1e-9  # keep BLEU's fractions finite, with the values of pycocoevalcap's bleu_scorer.py


def cider(predictions: Predictions, references: References, tokenize: Tokenize = ptb.tokenize) -> Score:
    """Return CIDEr-D, 10 x the mean similarity of TF-IDF vectors of n-grams; 1.0 is usually printed as 100.

    Document frequencies are those of the references given, as in COCO's evaluation: a score of a subset is not the
    subset's share of the score, and a single item has no score (its frequencies are all equal, so it gets 0).
    """
    matched = match(predictions, references)
    hypotheses, targets = tokenized(matched.predictions, matched.references, tokenize)
    documents = Counter[Ngram]()
    counts = [[_ngrams(tokens) for tokens in own] for own in targets]
    for own in counts:
        documents.update(set().union(*own))
    log_documents = math.log(len(targets))
    weigh = _Weights(documents, log_documents)
    scores = [
        _similarity(weigh(_ngrams(hypothesis)), [weigh(one) for one in own])
        for hypothesis, own in zip(hypotheses, counts, strict=True)
    ]
    return averaged(matched, scores)


def bleu(predictions: Predictions, references: References, tokenize: Tokenize = ptb.tokenize) -> dict[str, Score]:
    """Return {"bleu_1": …, …, "bleu_4": …}: corpus BLEU against the closest reference length, and each item's own."""
    matched = match(predictions, references)
    hypotheses, targets = tokenized(matched.predictions, matched.references, tokenize)
    # pycocoevalcap takes the mean of the references' lengths for a single item, the closest one for more.
    closest = len(targets) > 1
    parts = [_BleuParts(hypothesis, own, closest) for hypothesis, own in zip(hypotheses, targets, strict=True)]
    total = [sum(part.correct[n] for part in parts) for n in range(ORDERS)]
    guessed = [sum(part.guessed[n] for part in parts) for n in range(ORDERS)]
    length, target = sum(part.length for part in parts), sum(part.target_length for part in parts)
    corpus = _bleu(total, guessed, length, target)
    own = [_bleu(part.correct, part.guessed, part.length, part.target_length) for part in parts]
    return {
        f"bleu_{n + 1}": Score(corpus[n], matched.counts, dict(zip(matched.ids, (one[n] for one in own), strict=True)))
        for n in range(ORDERS)
    }


def tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: Tokenize
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return the tokens of each prediction, and of each item's references."""
    flat = iter(tokenize([text for own in references for text in own]))
    return tokenize(predictions), [[next(flat) for _ in own] for own in references]


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, ORDERS + 1) for start in range(len(tokens) - n + 1)
    )


class _Vector:
    """TF-IDF weights of the n-grams of a caption, their norm by order, and the number of its bigrams."""

    def __init__(self, weights: dict[Ngram, float], length: int) -> None:
        self.weights = weights
        self.length = length
        squares = [0.0] * ORDERS
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        self.norms = [math.sqrt(one) for one in squares]


class _Weights:
    """Turn counts of n-grams into weights, by the number of items whose references have them."""

    def __init__(self, documents: Counter[Ngram], log_documents: float) -> None:
        self.documents, self.log_documents = documents, log_documents

    def __call__(self, counts: Counter[Ngram]) -> _Vector:
        weights = {
            ngram: count * (self.log_documents - math.log(max(1, self.documents[ngram])))
            for ngram, count in counts.items()
        }
        # pycocoevalcap compares the numbers of bigrams for the captions' lengths.
        return _Vector(weights, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _similarity(hypothesis: _Vector, references: Sequence[_Vector]) -> float:
    """Return 10 x the mean over references and orders of the clipped cosine, with the penalty of length."""
    total = 0.0
    for reference in references:
        products = [0.0] * ORDERS
        for ngram, weight in hypothesis.weights.items():
            other = reference.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, other) * other
        penalty = math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * SIGMA**2))
        for product, own, other in zip(products, hypothesis.norms, reference.norms, strict=True):
            total += penalty * (product / (own * other) if own and other else product)
    return 10.0 * total / ORDERS / len(references)


class _BleuParts:
    """Numbers of n-grams guessed and correct for one item, and the two lengths."""

    def __init__(self, hypothesis: Tokens, references: Sequence[Tokens], closest: bool) -> None:
        most: Counter[Ngram] = Counter()
        for reference in references:
            most |= _ngrams(reference)
        found = _ngrams(hypothesis) & most
        self.length = len(hypothesis)
        self.guessed = [max(0, self.length - n) for n in range(ORDERS)]
        self.correct = [sum(count for ngram, count in found.items() if len(ngram) == n + 1) for n in range(ORDERS)]
        lengths = [len(reference) for reference in references]
        nearest = min((abs(length - self.length), length) for length in lengths)[1]
        self.target_length = float(nearest if closest else sum(lengths) / len(lengths))


def _bleu(correct: Sequence[int], guessed: Sequence[int], length: int, target: float) -> list[float]:
    """Return BLEU-1 to BLEU-4: the geometric means of the precisions, less for too short a text."""
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (correct[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1 / (n + 1)))
    ratio = (length + TINY) / (target + SMALL)
    return [score * math.exp(1 - 1 / ratio) if ratio < 1 else score for score in scores]
