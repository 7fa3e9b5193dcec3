"""Which language a text is in: the nearest profile of character trigrams, learned from the references of an evaluation.

Good enough to see whether captions come out in the language that was asked for, with no model to download: languages of
different scripts share no trigram, and languages of one script differ in their function words and endings.
"""

import math
from collections import Counter
from collections.abc import Iterable

from train.scores import normalized


class LanguageIdentifier:
    """Naive Bayes over character trigrams (Cavnar and Trenkle 1994 compare such profiles), add-one smoothed."""

    def __init__(self, references: Iterable[tuple[str, str]]) -> None:
        """`references`: pairs of (language code, text)."""
        self.counts: dict[str, Counter[str]] = {}
        for language, text in references:
            self.counts.setdefault(language, Counter()).update(trigrams(text))
        self.totals = {language: counts.total() for language, counts in self.counts.items()}
        self.distinct = len(set().union(*self.counts.values())) + 1

    def __call__(self, text: str) -> str | None:
        """The most probable language code; None for a text in which no known trigram occurs."""
        found = trigrams(text)
        if not any(trigram in counts for counts in self.counts.values() for trigram in found):
            return None
        return max(self.counts, key=lambda language: self._log_likelihood(found, language))

    def _log_likelihood(self, found: list[str], language: str) -> float:
        counts, total = self.counts[language], self.totals[language] + self.distinct
        return sum(math.log((counts[trigram] + 1) / total) for trigram in found)


def trigrams(text: str) -> list[str]:
    """The text's character trigrams, with a space at both ends."""
    padded = f" {normalized(text)} "
    return [padded[i : i + 3] for i in range(len(padded) - 2)]
