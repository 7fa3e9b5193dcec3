"""The last units stay gathered, up to 1e9 elements together."""

from parallel.plan.gathered import num_kept


def test_last_units_are_kept_up_to_a_limit() -> None:
    assert num_kept([]) == 0
    assert num_kept([5e8, 5e8]) == 2
    assert num_kept([1, 5e8, 5e8]) == 2
    assert num_kept([1, 1e9 + 1]) == 0  # what comes before a unit that is too large is not kept either
