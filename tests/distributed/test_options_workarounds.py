"""What `parallel/engine` takes of DeepSpeed is still needed, and still there: its private names, and our reasons.

A test that fails here after an upgrade names a reason: DeepSpeed's behavior is another one, or gone.
"""

import inspect
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.zero import linear, partition_parameters
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups
from torch import Tensor, nn

from benchmarks.parallel.traffic import counted
from benchmarks.world import results_file, run_world
from model.layers import parameter_parts
from model.pali import local_block
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.buckets import is_divided
from parallel.engine.build import build_engine
from parallel.engine.gathers import sharded_parameters
from parallel.engine.zero import ZeroEngine
from parallel.engine.zero3 import DEFAULTS
from parallel.layout import Layout
from tests.distributed.problem import FROZEN_VIT, PALI, all_gathers, micro_batches

UNITS = 10  # patches, 2 vit_blocks, bridge, 2 encoder_blocks, encoder_norm, 2 decoder_blocks, head
LIKE_OURS = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def make(freeze: tuple[str, ...] = (), **parallel: Any) -> ZeroEngine:
    layout = Layout.start(ParallelConfig(**{"param_persistence_threshold": 0, **parallel}, timeout_s=120), launch())
    engine = build_engine(PALI, OptimizerConfig(), layout, seed=1, freeze=freeze)
    assert isinstance(engine, ZeroEngine)
    return engine


def gradients_of_losses(engine: ZeroEngine, at_once: bool) -> list[Tensor]:
    """Of two micro-batches on each rank: forward passes first, or each followed by its backward pass."""
    if not at_once:
        engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    else:
        losses = [engine.model((), batch, loss_scale=1 / 100).loss for batch in micro_batches(0)[:2]]
        for number, loss in enumerate(losses, 1):
            engine.backward(loss, number == len(losses))
    engine.reducer.finish()
    found = [bucket.take_gradient() for bucket in engine.buckets]
    engine.reducer.finish()  # nothing is left
    assert not any(float(bucket.take_gradient().abs().max()) for bucket in engine.buckets)
    return found


def gathered(engine: ZeroEngine) -> list[bool]:
    """Whether each sharded parameter is whole on this rank."""
    return [p.ds_status == ZeroParamStatus.AVAILABLE for p in sharded_parameters(engine.model)]


def kept_until_the_update(engine: ZeroEngine) -> tuple[bool, bool]:
    """(whether all parameters are gathered after a step's micro-batches, whether any is after its update)."""
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    before = all(gathered(engine))
    engine.discard()
    return before, any(gathered(engine))


def shards_are_where_we_think(engine: ZeroEngine) -> bool:
    """Number the elements of logical tensors through our map of the shards, and gather the parameters."""
    numbers = {
        part.name: torch.arange(part.shape.numel()).view(part.shape) for _, part in parameter_parts(engine.model)
    }
    for shard in engine.shards():
        for r in shard.rectangles:
            r.view(shard.weights.detach()).copy_(numbers[r.name][r.slices])
    engine.publish()
    if engine.gathers is not None:
        engine.gathers.hold()
    return all(
        torch.equal(local_block(p.detach(), part), numbers[part.name].float())
        for p, part in parameter_parts(engine.model)
    )


def sent_in_a_step(engine: ZeroEngine, number: int) -> dict[tuple[str, str], float]:
    with counted({"data": engine.layout.data_group}) as sent:
        engine.forward_backward(micro_batches(0)[:number], num_targets=100)
        engine.discard()
    return dict(sent)


def refusal(config: dict[str, Any]) -> str:
    """Return how DeepSpeed answers `coalesce_grad_reduction`."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=LIKE_OURS | config)
    try:
        with engine.coalesce_grad_reduction():
            return ""
    except (AssertionError, NotImplementedError) as error:
        return str(error)


def observe(folder: Path) -> None:
    engine = make(zero_stage=3)
    batch = micro_batches(0)[0]
    seen: dict[str, Any] = {
        "gathers": all_gathers(lambda: engine.evaluate([batch])),
        "gathers of a step": all_gathers(lambda: engine.forward_backward([batch], 100)),
        "sent": {number: sent_in_a_step(engine, number) for number in (1, 3)},
    }
    seen["in turns"], seen["at once"] = (gradients_of_losses(engine, at_once) for at_once in (False, True))
    seen["kept, for each micro-batch"] = kept_until_the_update(engine)
    every = make(zero_stage=3, reduce="micro_batch")
    seen["in turns, every one"], seen["sent, every one"] = gradients_of_losses(every, False), sent_in_a_step(every, 3)
    seen["kept"] = kept_until_the_update(make(zero_stage=3, gather="step"))
    seen["found"] = [shards_are_where_we_think(make(zero_stage=stage)) for stage in (1, 2, 3)]
    for shard_frozen in (False, True):
        engine = make((*FROZEN_VIT,), zero_stage=3, shard_frozen=shard_frozen)
        frozen = [is_divided(p) for p in engine.model.parameters() if not p.requires_grad]
        seen["frozen", shard_frozen] = set(frozen), all_gathers(lambda: engine.evaluate([batch]))  # noqa: B023
    groups._create_zero_param_parallel_group(2)
    with pytest.raises(AssertionError):
        groups._create_zero_param_parallel_group(2)
    own = {"managed_gradient_accumulation": False, "zero_optimization": {"stage": 2}}
    seen["refusals"] = [refusal(own), refusal({**BF16, "zero_optimization": {"stage": 1}})]
    if engine.layout.rank == 0:
        torch.save(seen, results_file(folder, "seen"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workarounds")
    run_world(2, observe, folder)
    return torch.load(results_file(folder, "seen"))


def test_the_version_that_was_looked_at() -> None:
    assert deepspeed.__version__.startswith("0.19."), "read parallel/engine/zero3.py again beside this DeepSpeed"


def test_private_names_are_where_we_reach_for_them() -> None:
    assert hasattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP") and callable(groups._get_local_all_to_all_group)
    source = inspect.getsource(partition_parameters.Init)
    for name in ("ds_tensor", "ds_numel", "ds_status", "ds_shape", "ds_secondary_tensor"):
        assert f"param.{name}" in source, name


def test_defaults_are_those_that_are_written_out() -> None:
    theirs = DeepSpeedZeroConfig()
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS


def test_gathered_memory_is_not_kept_by_a_linear_map() -> None:
    """The gradient of the input needs the weight: it is read from the parameter, not from the memory of the forward."""
    weight, x = nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2, requires_grad=True)
    y = linear.zero3_linear_wrap(x, weight)
    weight.data = torch.full((2, 2), 3.0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((2, 2), 6.0))


def test_a_unit_is_one_gather_in_each_pass(seen: dict[str, Any]) -> None:
    """The backward pass follows at once, so the last units, here all, are still there."""
    assert seen["gathers"] == seen["gathers of a step"] == UNITS


def test_gradients_are_sent_once_a_step_or_in_every_micro_batch(seen: dict[str, Any]) -> None:
    once, three = (seen["sent"][number]["data", "reduce-scatter"] for number in (1, 3))
    assert once == three > 0
    assert seen["sent, every one"]["data", "reduce-scatter"] == 3 * once


@pytest.mark.parametrize("other", ["at once", "in turns, every one"])
def test_gradients_do_not_depend_on_the_order_of_passes(seen: dict[str, Any], other: str) -> None:
    for found, expected in zip(seen[other], seen["in turns"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_parameters_are_kept_by_the_step_and_given_back_by_the_update(seen: dict[str, Any]) -> None:
    assert seen["kept"] == (True, False)
    assert seen["kept, for each micro-batch"] == (False, False)


def test_frozen_parameters_are_whole_unless_asked_for(seen: dict[str, Any]) -> None:
    assert seen["frozen", False] == ({False}, UNITS - 3)
    assert seen["frozen", True] == ({True}, UNITS)


def test_shards_are_found(seen: dict[str, Any]) -> None:
    assert seen["found"] == [True, True, True]


def test_deepspeed_would_not_sum_once_a_step_here(seen: dict[str, Any]) -> None:
    accumulation, narrow = seen["refusals"]
    assert "managed_gradient_accumulation=False" in accumulation
    assert "does not yet support optimizer wrapper BF16_Optimizer" in narrow
