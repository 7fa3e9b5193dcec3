"""Which ranks share what under ZeRO, without starting any of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.utils import groups

from parallel.config import ParallelConfig
from parallel.engine import zero


def test_nearby_ranks_are_those_next_to_each_other_among_the_data_parallel_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four data-parallel ranks, two tensor-parallel ones each, in groups of two."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group)
    monkeypatch.setattr(dist, "new_group", lambda ranks, use_local_synchronization: ranks)
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)

    def nearby(rank: int, size: int) -> Any:
        config = ParallelConfig(tensor=2, zero_stage=3, hpz_partition_size=size)
        layout: Any = SimpleNamespace(config=config, data_group=[0, 2, 4, 6], data_parallel_rank=rank)
        return zero._start_nearby_group(layout)

    assert [nearby(rank, 1) for rank in range(4)] == [None] * 4
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    assert [nearby(rank, 2) for rank in range(4)] == [[0, 2], [0, 2], [4, 6], [4, 6]]
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP == [4, 6]
    assert nearby(3, 4) == [0, 2, 4, 6]
