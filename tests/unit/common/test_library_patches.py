"""Every patch of a library is still needed and works; test_options_workarounds.py observes DeepSpeed in a world."""

import subprocess
import sys

import deepspeed
import megatron.core
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.utils import groups

from common.library_patches import (
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


def test_the_secondary_group_is_where_deepspeed_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)
    set_secondary_group("nearby")  # type: ignore[arg-type]
    assert groups._get_zero_param_intra_parallel_group() == "nearby"


PLANNED = """
import torch, torch.distributed as dist
from megatron.core.tensor_parallel import layers
from torch.testing._internal.distributed.fake_pg import FakeStore

original = layers.get_tensor_model_parallel_group_if_none, layers.get_pg_size
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_info
from model.tensor_parallel import PlannedGroup, TensorParallel, join_group
from model.pali import plan_on_meta

group = PlannedGroup(num_ranks=2, rank=1)
assert original[0](group) is None and original[1](group) == 1, "let_megatron_plan is not needed"

VIT = ViTConfig(width=64, depth=2, mlp_dim=160, num_heads=4, patch_size=14)
MT5 = MT5Config(d_model=64, d_ff=96, d_kv=16, num_heads=4, num_encoder_layers=1, num_decoder_layers=1, vocab_size=256)
CONFIG = PaLIConfig(VIT, MT5, ModelConfig(image_size=28), 1)

def layout(plan):
    return [(name, p.shape, [(part.name, part.slices, part.start) for part in parameter_info(p).parts])
            for name, p in plan.named_parameters()]

before = plan_on_meta(CONFIG, (), TensorParallel(group, sequence=True))
dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
after = plan_on_meta(CONFIG, (), TensorParallel(dist.group.WORLD, sequence=True))
assert layout(before) == layout(after)
join_group(before, dist.group.WORLD)

def plain(module):
    skipped = {"parallel", "config", "init_method"}
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in skipped}

for (name, one), (_, other) in zip(before.named_modules(), after.named_modules(), strict=True):
    assert plain(one).keys() == plain(other).keys(), name
    for key, value in plain(one).items():
        assert value == plain(other)[key], (name, key)
    assert not hasattr(one, "parallel") or one.parallel == other.parallel, name
print("equal")
"""


def test_a_model_planned_before_groups_start_is_that_of_started_groups() -> None:
    done = subprocess.run([sys.executable, "-c", PLANNED], capture_output=True, encoding="utf-8", timeout=120)
    assert done.stdout.strip() == "equal", done.stderr
