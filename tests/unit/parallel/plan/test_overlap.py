"""Messages between replicas beside the passes of units, played by hand."""

from parallel.plan.overlap import UnitPass, exposed


def test_the_next_unit_is_gathered_beside_the_one_that_runs() -> None:
    assert exposed([UnitPass(5, 2), UnitPass(5, 2), UnitPass(5, 2)]) == (2, 0)  # the first one hides nothing
    assert exposed([UnitPass(1, 2), UnitPass(1, 2), UnitPass(1, 2)]) == (4, 0)
    assert exposed([UnitPass(5), UnitPass(5, 2)]) == (2, 0)  # nor does a unit that has nothing to gather


def test_sums_are_sent_beside_the_units_below_one_at_a_time() -> None:
    assert exposed([UnitPass(5, 0, 4), UnitPass(5, 0, 4)]) == (0, 4)  # the last one hides nothing
    assert exposed([UnitPass(1, 0, 4), UnitPass(1, 0, 4)]) == (0, 7)
    assert exposed([UnitPass(1, 1, 4), UnitPass(1, 1, 0)]) == (1, 3)  # sent for before the sum was ready
    assert exposed([UnitPass(1, 1, 4), UnitPass(1, 1), UnitPass(1, 1)]) == (1 + 4, 0)  # the link is busy


def test_nothing_takes_no_time() -> None:
    assert exposed([]) == (0, 0)
