"""Which language a text is in: the nearest profile of character n-grams, learned from the references of an evaluation.

Good enough to see whether captions come out in the language that was asked for, with no model to download: languages of
different scripts share no letters, and languages of one script differ in their function words and endings.
"""

import math
from collections import Counter
from collections.abc import Iterable

from evaluation.text_scores import normalized


class LanguageIdentifier:
    """Naive Bayes over character n-grams (Cavnar and Trenkle 1994 compare such profiles), add-one smoothed."""

    def __init__(self, references: Iterable[tuple[str, str]]) -> None:
        """`references`: pairs of (language code, text)."""
        self.counts: dict[str, Counter[str]] = {}
        for language, text in references:
            self.counts.setdefault(language, Counter()).update(ngrams(text))
        self.totals = {language: counts.total() for language, counts in self.counts.items()}
        self.distinct = len(set().union(*self.counts.values())) + 1

    def __call__(self, text: str) -> str | None:
        """The most probable language code; None for a text of which no letter is known."""
        found = ngrams(text)
        if not any(gram in counts for counts in self.counts.values() for gram in found):
            return None
        return max(self.counts, key=lambda language: self._log_likelihood(found, language))

    def _log_likelihood(self, found: list[str], language: str) -> float:
        counts, total = self.counts[language], self.totals[language] + self.distinct
        return sum(math.log((counts[gram] + 1) / total) for gram in found)


def ngrams(text: str) -> list[str]:
    """The text's letters, pairs and triples of letters; in these the ends of words count as letters."""
    padded = f" {normalized(text)} "
    longer = [padded[i : i + length] for length in (2, 3) for i in range(len(padded) - length + 1)]
    return [letter for letter in padded if letter != " "] + longer
