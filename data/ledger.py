"""Counts what was read and what had to be left out, per source and cause, and enforces the error budget."""

import logging
import threading
from collections import Counter

from errors import ReadingStopped

logger = logging.getLogger(__name__)


class ErrorBudgetExceeded(ReadingStopped):
    """Too many records of a source are broken to go on: the message names source, shard, causes and counts."""


class Ledger:
    """One per stream; safe to use from the threads that read.

    budget: the fraction of a source's records read so far that may be broken; up to `minimum` are always forgiven.
    """

    def __init__(self, budget: float, minimum: int):
        self.budget = budget
        self.minimum = minimum
        self._lock = threading.Lock()
        self._read: Counter[str] = Counter()
        self._defects: dict[str, Counter[tuple[str, str]]] = {}
        self._fresh: Counter[str] = Counter()

    def count_read(self, source: str) -> None:
        with self._lock:
            self._read[source] += 1

    def count_skip(self, source: str, cause: str) -> None:
        """A record that is whole, but not of the kind an objective needs: counted, never an error."""
        with self._lock:
            self._fresh[f"{source}/{cause}"] += 1

    def count_defect(self, source: str, shard: str, cause: str) -> None:
        """A broken record (or shard); raises ErrorBudgetExceeded when its source has had too many."""
        with self._lock:
            self._fresh[f"{source}/{cause}"] += 1
            defects = self._defects.setdefault(source, Counter())
            if (shard, cause) not in defects:
                logger.warning("source %s: %s in %s; skipped and counted", source, cause, shard)
            defects[shard, cause] += 1
            broken, read = defects.total(), self._read[source]
            if broken <= max(self.minimum, self.budget * read):
                return
            (worst, worst_cause), count = defects.most_common(1)[0]
            causes: Counter[str] = Counter()
            for (_, each), number in defects.items():
                causes[each] += number
        listing = ", ".join(f"{number} x {each}" for each, number in causes.most_common())
        raise ErrorBudgetExceeded(
            f"source {source} is over its error budget: {broken} of {read} records read are broken ({listing}), and "
            f"data.error_budget={self.budget:g} with data.error_budget_minimum={self.minimum} allows fewer; "
            f"most are in shard {worst} ({count} x {worst_cause})."
        )

    def drain(self) -> dict[str, int]:
        """Counts of "source/cause" since the last call."""
        with self._lock:
            fresh, self._fresh = self._fresh, Counter()
        return dict(fresh)
