"""Every patch of a library is still needed and works; test_options_workarounds.py observes DeepSpeed in a world."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import megatron.core
import pytest
import torch
import torch.distributed as dist
from deepspeed.comm.torch import build_shm_op
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.utils import groups

from common.library_patches import (
    confine_zero3_comparison,
    set_secondary_group,
    skip_shared_memory_op,
    without_compilers_and_loggers,
)

REDUCE_SCATTER = """
import torch, torch.distributed as dist
from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region as reduce_scatter
from torch.testing._internal.distributed.fake_pg import FakeStore
from common.library_patches import let_megatron_use_cpus

torch.cuda.is_available = lambda: False
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
try:
    reduce_scatter(torch.ones(4), group=dist.group.WORLD)
    print("not needed")
except (AssertionError, RuntimeError):
    let_megatron_use_cpus()
    print(reduce_scatter(torch.ones(4), group=dist.group.WORLD).device)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patch is for processes without CUDA")
def test_megatron_allocates_on_a_gpu_that_is_not_there() -> None:
    assert megatron.core.__version__.startswith("0.16."), "look at let_megatron_use_cpus beside this Megatron"
    done = subprocess.run(
        [sys.executable, "-c", REDUCE_SCATTER], capture_output=True, encoding="utf-8", timeout=120, check=True
    )
    assert done.stdout.strip() == "cpu"


def test_decorators_return_functions_as_they_are_while_megatron_is_imported() -> None:
    compiles = torch.compile
    with without_compilers_and_loggers():
        assert torch.compile(len) is len and torch.compile(dynamic=True)(len) is len
        if "wandb" not in sys.modules or sys.modules["wandb"] is None:
            with pytest.raises(ImportError):
                import wandb  # noqa: F401
    assert torch.compile is compiles and sys.modules.get("wandb", deepspeed) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed has this op on CPUs only")
def test_deepspeed_would_compile_an_unused_op(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deepspeed.__version__.startswith("0.19."), "look at skip_shared_memory_op beside this DeepSpeed"
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    skip_shared_memory_op()
    assert build_shm_op() is None


def comparison(monkeypatch: pytest.MonkeyPatch, others: list[int]) -> Callable[[list[int]], None]:
    """ZeRO-3's comparison, as patched, in a group with one other rank."""
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        monkeypatch.setattr(module, "assert_ints_same_as_other_ranks", None)

    def all_reduce(x: torch.Tensor, op: Any, group: str) -> None:
        assert group == "stage"
        both = torch.stack([x, torch.tensor(others) - min(others)])
        x.copy_(both.amin(0) if op == dist.ReduceOp.MIN else both.amax(0))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    confine_zero3_comparison("stage")  # type: ignore[arg-type]
    patched = {m.assert_ints_same_as_other_ranks for m in (partition_parameters, partitioned_param_coordinator, stage3)}
    (compare,) = patched
    return compare  # type: ignore[no-any-return]


def test_ids_are_compared_within_a_stage_from_where_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = comparison(monkeypatch, others=[9, 10, 12])
    compare([5, 6, 8])
    with pytest.raises(RuntimeError, match="ranks of one pipeline stage run different modules"):
        compare([5, 6, 7])


def test_the_secondary_group_is_where_deepspeed_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)
    set_secondary_group("nearby")  # type: ignore[arg-type]
    assert groups._get_zero_param_intra_parallel_group() == "nearby"
