"""How sequences are divided over the ranks of a group that is not started."""

import pytest

from model.tensor_parallel import PlannedGroup, TensorParallel


@pytest.mark.parametrize(("length", "missing"), [(8, 0), (9, 3), (11, 1), (1, 3)])
def test_a_sequence_is_padded_to_a_multiple_of_the_ranks(length: int, missing: int) -> None:
    group = PlannedGroup(4, rank=1)
    assert TensorParallel(group, sequence=True).padding(length) == missing
    assert TensorParallel(group).padding(length) == 0
