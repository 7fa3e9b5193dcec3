"""Count used, skipped and broken records by source and cause, and enforce the error budget."""

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from common.errors import ReadingStopped

logger = logging.getLogger(__name__)

MOST_CAUSES = 100  # different causes per source that are counted apart
OTHER = "other causes"
WINDOW = 10_000  # records


class ErrorBudgetExceeded(ReadingStopped):
    """Raised where too many records of a source are broken; the message names source, shard, causes and counts."""


class NothingUsable(ErrorBudgetExceeded):
    """Raised where a component finds no example in its source; the message names both, the cause and a remedy."""


@dataclass
class Account:
    """Counts of the records of one source: each one that is read is used, skipped or broken."""

    used: int = 0
    skipped: int = 0
    broken: int = 0

    @property
    def read(self) -> int:
        """Return the number of all of them."""
        return self.used + self.skipped + self.broken


@dataclass
class _Source:
    """One source: its account, and the outcomes of the records and shards that were read last.

    `recent` holds None for a whole one, (shard, cause) for a broken one; `broken` counts the latter. `last` holds, for
    each cause, details of the last record that it was found in.
    """

    recent: deque[tuple[str, str] | None]
    account: Account = field(default_factory=Account)
    causes: Counter[str] = field(default_factory=Counter)
    last: dict[str, str] = field(default_factory=dict)
    broken: int = 0

    def add(self, outcome: tuple[str, str] | None) -> None:
        """Append to `recent`; the oldest outcome leaves a full window."""
        if len(self.recent) == self.recent.maxlen:
            self.broken -= self.recent[0] is not None
        self.recent.append(outcome)
        self.broken += outcome is not None

    def counted(self, cause: str) -> str:
        """Return the cause to count under: few, so that texts from the data cannot fill memory and metrics."""
        cause = cause if cause in self.causes or len(self.causes) < MOST_CAUSES else OTHER
        self.causes[cause] += 1
        return cause


class _Muted(threading.local):
    of_thread = False


class Ledger:
    """Count the records of all sources of a stream; safe to use from the threads that read.

    `budget`: the fraction of the last `window` records read of a source that may be broken; up to `minimum` of them are
    always forgiven.
    """

    def __init__(self, budget: float, minimum: int, window: int = WINDOW):
        self.budget = budget
        self.minimum = minimum
        self.window = window
        self._lock = threading.Lock()
        self._muted = _Muted()
        self._sources: dict[str, _Source] = {}
        self._fresh: Counter[str] = Counter()

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Count no record or shard that this thread reads: another rank reads it too, or no example is made of it."""
        before, self._muted.of_thread = self._muted.of_thread, True
        try:
            yield
        finally:
            self._muted.of_thread = before

    def account(self, source: str) -> Account:
        """Return the counts of a source until now."""
        with self._lock:
            own = self._of(source).account
            return Account(own.used, own.skipped, own.broken)

    def count_used(self, source: str) -> None:
        """Count a record that became an example."""
        if self._muted.of_thread:
            return
        with self._lock:
            own = self._of(source)
            own.account.used += 1
            own.add(None)

    def count_skip(self, source: str, cause: str) -> None:
        """Count a record that is whole, but not of the kind that an objective needs; it costs no budget."""
        if self._muted.of_thread:
            return
        with self._lock:
            own = self._of(source)
            own.account.skipped += 1
            own.add(None)
            self._fresh[f"{source}/{own.counted(cause)}"] += 1

    def count_defect(self, source: str, shard: str, cause: str, detail: str = "") -> None:
        """Count a broken record; raise ErrorBudgetExceeded where too many recent ones of its source are broken.

        `detail` names the record and its fault for logs and the error; it is not part of the cause that is counted.
        """
        if self._muted.of_thread:
            return
        with self._lock:
            own = self._of(source)
            own.account.broken += 1
            self._count_broken(source, own, shard, cause, detail)

    def count_shards(self, source: str, whole: int, broken: Mapping[str, str]) -> None:
        """Count the shards that were opened; each broken one, path -> defect, costs as much as a broken record."""
        if self._muted.of_thread:
            return
        with self._lock:
            own = self._of(source)
            for _ in range(min(whole, self.window)):
                own.add(None)
            for shard, defect in broken.items():
                self._count_broken(source, own, shard, defect)

    def count_left_out(self, source: str, cause: str, number: int) -> None:
        """Count what was left out but is not a record: stray members of tars, shards that are there twice."""
        with self._lock:
            self._fresh[f"{source}/{cause}"] += number

    def check_left_out(self, source: str, lost: Mapping[tuple[str, str], int], members: int) -> None:
        """Raise ErrorBudgetExceeded if too many of the `members` of a source's tars are lost, by (shard, cause)."""
        number = sum(lost.values())
        if number <= max(self.minimum, self.budget * members):
            return
        ((worst, cause), count) = max(lost.items(), key=lambda item: item[1])
        raise ErrorBudgetExceeded(
            f"source {source} is over its error budget: {number} of {members} members of its shards are lost "
            f"({_listing(lost)}), and data.error_budget={self.budget:g} with data.error_budget_minimum={self.minimum} "
            f"allows fewer; most are in shard {worst} ({count} x {cause})."
        )

    def drain(self) -> dict[str, int]:
        """Return the counts of "source/cause" since the last call."""
        with self._lock:
            fresh, self._fresh = self._fresh, Counter()
        return dict(fresh)

    def replay(self, events: "Iterable[Event]") -> None:
        """Count what a `Recorder` in another process noted; raise ErrorBudgetExceeded as `count_defect` does."""
        for method, *arguments in events:
            getattr(self, method)(*arguments)

    def _of(self, source: str) -> _Source:
        if source not in self._sources:
            self._sources[source] = _Source(deque(maxlen=self.window))
        return self._sources[source]

    def _count_broken(self, source: str, own: _Source, shard: str, cause: str, detail: str = "") -> None:
        cause = own.counted(cause)
        own.last[cause] = f" ({detail})" if detail else ""
        self._fresh[f"{source}/{cause}"] += 1
        own.add((shard, cause))
        self._log(source, cause, own.causes[cause], shard, own.last[cause])
        if own.broken > max(self.minimum, self.budget * len(own.recent)):
            raise ErrorBudgetExceeded(self._sentence(source, own))

    def _log(self, source: str, cause: str, count: int, shard: str, detail: str) -> None:
        """Log the first of a kind and each tenfold of them, so that a run of weeks logs a handful of lines."""
        if count == 1:
            logger.warning("source %s: %s in %s%s; skipped and counted", source, cause, shard, detail)
        elif count == 10 ** (len(str(count)) - 1):
            times = f"{count:,} times so far"
            logger.warning("source %s: %s, %s, the last in %s%s", source, cause, times, shard, detail)

    def _sentence(self, source: str, own: _Source) -> str:
        found = Counter(outcome for outcome in own.recent if outcome is not None)
        ((worst, worst_cause), count) = found.most_common(1)[0]
        return (
            f"source {source} is over its error budget: {own.broken} of {len(own.recent)} records read are broken "
            f"({_listing(found)}), and data.error_budget={self.budget:g} with data.error_budget_minimum={self.minimum} "
            f"allows fewer of the last data.error_window={self.window}; most are in shard {worst} "
            f"({count} x {worst_cause}); the last {worst_cause}{own.last[worst_cause]}; repair or remove the shard, or "
            "raise data.error_budget if the source is as good as that."
        )


class Recorder(Ledger):
    """Note what a process that reads for another one counts, in order; `Ledger.replay` of the other counts it."""

    def __init__(self) -> None:
        super().__init__(1.0, 0)
        self._events: list[Event] = []

    def count_used(self, source: str) -> None:
        """See Ledger.count_used."""
        self._note("count_used", source)

    def count_skip(self, source: str, cause: str) -> None:
        """See Ledger.count_skip."""
        self._note("count_skip", source, cause)

    def count_defect(self, source: str, shard: str, cause: str, detail: str = "") -> None:
        """See Ledger.count_defect; the process that replays it raises."""
        self._note("count_defect", source, shard, cause, detail)

    def take(self) -> "list[Event]":
        """Return what was counted since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def _note(self, *event: str) -> None:
        if not self._muted.of_thread:
            with self._lock:
                self._events.append(event)


Event = tuple[str, ...]


def _listing(found: Mapping[tuple[str, str], int]) -> str:
    """List the causes of what was found, by (shard, cause), the most frequent first."""
    causes: Counter[str] = Counter()
    for (_, cause), number in found.items():
        causes[cause] += number
    return ", ".join(f"{number} x {cause}" for cause, number in causes.most_common())
