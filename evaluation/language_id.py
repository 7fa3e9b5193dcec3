"""Identify the language of a text by character n-grams, learned from the references of an evaluation.

Languages of different scripts share no letters, and languages of one script differ in their function words and endings.
So these profiles suffice to check that captions are in the language of the prompt, without a model to download.
"""

import math
from collections import Counter
from collections.abc import Iterable

from evaluation.text_scores import normalized


class LanguageIdentifier:
    """Classify texts by naive Bayes over character n-grams, add-one smoothed (Cavnar and Trenkle 1994)."""

    def __init__(self, references: Iterable[tuple[str, str]]) -> None:
        """Count the n-grams of `references`: pairs of (language code, text)."""
        self.counts: dict[str, Counter[str]] = {}
        for language, text in references:
            self.counts.setdefault(language, Counter()).update(ngrams(text))
        self.totals = {language: counts.total() for language, counts in self.counts.items()}
        self.distinct = len(set().union(*self.counts.values())) + 1

    def __call__(self, text: str) -> str | None:
        """Return the most probable language code; None for a text without any n-gram of the references."""
        found = ngrams(text)
        if not any(gram in counts for counts in self.counts.values() for gram in found):
            return None
        return max(self.counts, key=lambda language: self._log_likelihood(found, language))

    def _log_likelihood(self, found: list[str], language: str) -> float:
        counts, total = self.counts[language], self.totals[language] + self.distinct
        return sum(math.log((counts[gram] + 1) / total) for gram in found)


def ngrams(text: str) -> list[str]:
    """Return the letters, pairs and triples of a text; the ends of words count as letters in pairs and triples."""
    padded = f" {normalized(text)} "
    longer = [padded[i : i + length] for length in (2, 3) for i in range(len(padded) - length + 1)]
    return [letter for letter in padded if letter != " "] + longer
