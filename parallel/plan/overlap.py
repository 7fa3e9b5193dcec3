"""Play a pass of a stage's units against the link between data-parallel ranks: what of its messages no work hides.

One link runs beside the work, one message at a time. ZeRO-3 sends for the next unit's parameters when a unit begins
(parallel/engine/gathers.py); a bucket of gradients is sent when it is complete (parallel/engine/reducer.py).
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple


class UnitPass(NamedTuple):
    """Seconds of one unit's pass: its work, the gathering that it needs, and the sum that it makes ready."""

    work_s: float
    gather_s: float = 0.0
    reduce_s: float = 0.0


def exposed(passes: Sequence[UnitPass]) -> tuple[float, float]:
    """Return the seconds in which units wait for their parameters, and those of sums after the last unit.

    Nothing is sent for before the first unit that needs parameters begins.
    """
    coming = deque(each.gather_s for each in passes if each.gather_s)
    now = link = waited = 0.0
    arrival: float | None = None
    for work, gather, reduce in passes:
        if gather:
            if arrival is None:  # nothing has sent for it
                arrival = link = max(link, now) + coming.popleft()
            waited += max(0.0, arrival - now)
            now = max(now, arrival)
            if coming:
                arrival = link = max(link, now) + coming.popleft()
        now += work
        if reduce:
            link = max(link, now) + reduce
    return waited, max(0.0, link - now)
