"""The worlds of these tests run on NCCL where GPUs are enough."""

import pytest
import torch.distributed as dist

from benchmarks.world import backend, run_world, visible
from parallel.config import ParallelConfig
from parallel.distributed import launch
from parallel.layout import Layout


@pytest.mark.parametrize(("gpus", "chosen"), [(0, "gloo"), (3, "gloo"), (4, "nccl"), (8, "nccl")])
def test_a_gpu_for_every_rank_or_none(gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert backend(4) == chosen
    assert ("CUDA_VISIBLE_DEVICES" in visible(4)) == (chosen == "gloo")


def test_ranks_reach_over_the_chosen_backend() -> None:
    run_world(2, _reach, backend(2))


def _reach(expected: str) -> None:
    layout = Layout.start(ParallelConfig(), launch())
    assert layout.device.type == {"nccl": "cuda", "gloo": "cpu"}[expected]
    assert expected in str(dist.get_backend_config())
    layout.barrier()
