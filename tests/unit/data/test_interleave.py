"""After any number of examples each component's count is within 1 of its share, however far a run has come."""

import sys

import numpy as np
import pytest

from data.interleave import LONGEST, interleave

PAPER = (100.0, 1000.0, 100.0, 100.0, 100.0, 100.0, 50.0, 16.0)
CASES = [
    *(PAPER, (1.0,), (1.0, 1.0), (2.0, 1.0), (0.1, 0.3, 0.2), (8.0, 5.0, 3.0, 2.0, 1.0), (7.0, 7.0, 7.0, 1.0)),
    *((1000.0 / 1566, 566.0 / 1566), (0.9, 0.09, 0.009, 0.001), (1e-310, 3e-310), tuple(map(float, range(1, 30)))),
]


@pytest.mark.parametrize("weights", CASES)
def test_counts_are_within_one_of_the_shares_at_every_place(weights):
    order = interleave(weights)
    shares = np.array(weights) / sum(weights)
    places = np.arange(1, len(order.components) + 1)
    for number, share in enumerate(shares):
        own = order.components == number
        counts = np.cumsum(own)
        assert np.abs(counts - places * share).max() < 1
        assert np.array_equal(order.before[own], np.arange(own.sum()))
    assert order.parts == tuple(np.bincount(order.components, minlength=len(weights)))


def test_a_place_far_ahead_costs_what_the_first_one_does():
    order = interleave(PAPER)
    assert len(order.components) == 783
    component, count = order.place(4096 * 10**6 + 5)
    periods, within = divmod(4096 * 10**6 + 5, 783)
    assert (component, count) == (order.components[within], periods * order.parts[component] + order.before[within])
    assert lines_run(order.place, 10) == lines_run(order.place, 4096 * 10**6)


def lines_run(function, *arguments):
    """Count the lines of Python that a call runs."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("weights", [(np.pi, np.e, 1.0), (1.0, 1e-6), (123.4567891, 0.0987654321)])
def test_weights_in_no_simple_ratio_are_rounded(weights):
    order = interleave(weights)
    assert len(order.components) <= LONGEST + len(weights)
    shares = np.array(order.parts) / sum(order.parts)
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 4e-6 and min(order.parts) >= 1
