"""Interleave the components of a mixture by weight: after any number of examples, each count is within 1 of its share.

The shares are fractions of a period; the order of one period is a schedule by earliest deadline: the j-th example of a
component with share s may come from place floor(j / s) on and comes before ceil((j + 1) / s). With shares that sum to 1
all deadlines are kept (Baruah et al., "Proportionate Progress", 1996), which bounds each count on both sides.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LONGEST = 1 << 20  # examples of a period; ratios of weights that need a longer one are rounded to ROUNDED parts
ROUNDED = 1 << 18
EXACT = 1e-12  # relative difference of a float and the fraction that it is taken for


class Interleave(NamedTuple):
    """The order of components in a period: component and count of it before, by place; `parts`: counts in a period."""

    components: NDArray[np.uint16]
    before: NDArray[np.uint32]
    parts: tuple[int, ...]

    def place(self, number: int) -> tuple[int, int]:
        """Return the component of example `number`, and how many examples of the component come before it."""
        periods, within = divmod(number, len(self.components))
        component = int(self.components[within])
        return component, periods * self.parts[component] + int(self.before[within])


@lru_cache(maxsize=32)
def interleave(weights: tuple[float, ...]) -> Interleave:
    """Return the order of components with these weights, which are above 0."""
    parts = _parts(weights)
    period = sum(parts)
    components, before = np.zeros(period, np.uint16), np.zeros(period, np.uint32)
    counts, due = [0] * len(parts), list[tuple[int, int]]()
    released = [(0, number) for number in range(len(parts))]
    heapq.heapify(released)
    for place in range(period):
        while released and released[0][0] <= place:
            _, number = heapq.heappop(released)
            heapq.heappush(due, (-(-(counts[number] + 1) * period // parts[number]), number))
        _, number = heapq.heappop(due)
        components[place], before[place] = number, counts[number]
        counts[number] += 1
        if counts[number] < parts[number]:
            heapq.heappush(released, (counts[number] * period // parts[number], number))
    return Interleave(components, before, parts)


def _parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in the ratio of the weights; of a ratio that needs too large ones, the nearest."""
    most = max(weights)
    ratios = [Fraction(weight / most).limit_denominator(LONGEST) for weight in weights]
    exact = all(abs(float(r) - w / most) <= EXACT * (w / most) for r, w in zip(ratios, weights, strict=True))
    common = math.lcm(*(ratio.denominator for ratio in ratios))
    parts = [int(ratio * common) for ratio in ratios]
    if not exact or sum(parts) > LONGEST:
        total = math.fsum(weight / most for weight in weights)
        parts = [max(1, round(weight / most / total * ROUNDED)) for weight in weights]
    divisor = math.gcd(*parts)
    return tuple(part // divisor for part in parts)
