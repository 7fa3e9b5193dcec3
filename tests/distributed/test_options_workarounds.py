"""Every workaround of `parallel/engine/zero.py` is still needed: without it, DeepSpeed gives something else or refuses.

A test that fails here after an upgrade names a workaround: DeepSpeed's behavior is another one, or gone.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime import constants
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import assert_ints_same_as_other_ranks
from deepspeed.utils import groups, safe_get_full_fp32_param

from benchmarks.world import results_file, run_world
from model.layers import parameter_parts
from model.pali import local_block
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine import zero
from parallel.engine.build import build_engine
from parallel.engine.zero import ZeroEngine
from parallel.layout import Layout
from tests.distributed.problem import PALI, all_gathers, micro_batches, train

# Settings that DeepSpeed has for keeping parameters gathered, instead of our workaround.
MOST_LIVE = dict.fromkeys(("stage3_max_live_parameters", "stage3_max_reuse_distance"), 10**15)


def make(**parallel: Any) -> ZeroEngine:
    layout = Layout.start(ParallelConfig(**{"param_persistence_threshold": 0, **parallel}, timeout_s=120), launch())
    engine = build_engine(PALI, OptimizerConfig(), layout, seed=1)
    assert isinstance(engine, ZeroEngine)
    return engine


def norm(engine: ZeroEngine) -> float:
    """Of the gradient of two micro-batches on each rank."""
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    return engine.update(0.0)


def norm_of_two_backwards_in_a_row(engine: ZeroEngine) -> float:
    losses = []
    for batch in micro_batches(0)[:2]:
        losses.append(engine.model((), batch, loss_scale=engine.gradient_scale / 100).loss)
    for loss in losses:
        engine.backward(loss)
    return engine.update(0.0)


def first_gathers(engine: ZeroEngine) -> tuple[int, int]:
    """All-gathers of the very first step, of two micro-batches, in which DeepSpeed does not know the order yet; and
    those of its update."""
    first = all_gathers(lambda: engine.forward_backward(micro_batches(0)[:2], num_targets=100))
    return first, all_gathers(engine.discard)


def with_settings(zero_stage: int, **settings: Any) -> ZeroEngine:
    """ZeRO with other settings of `zero_optimization` than ours."""
    ours = zero._deepspeed_config

    def theirs(blueprint: Any) -> dict[str, Any]:
        config = ours(blueprint)
        return config | {"zero_optimization": config["zero_optimization"] | settings}

    zero._deepspeed_config = theirs
    try:
        return make(zero_stage=zero_stage)
    finally:
        zero._deepspeed_config = ours


def kept_until_the_update(engine: ZeroEngine) -> tuple[bool, bool]:
    """(whether all parameters are gathered after a step's micro-batches, whether any is after its update)."""

    def gathered() -> list[bool]:
        return [p.ds_status == ZeroParamStatus.AVAILABLE for p in engine.model.parameters()]  # type: ignore[attr-defined]

    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    before = all(gathered())
    engine.discard()
    return before, any(gathered())


def shards_are_where_we_think(engine: ZeroEngine) -> bool:
    """Number the elements of logical tensors through our map of the shards, and ask DeepSpeed for the parameters."""
    numbers = {
        part.name: torch.arange(part.shape.numel()).view(part.shape) for _, part in parameter_parts(engine.model)
    }
    for shard in engine.shards():
        for r in shard.rectangles:
            where = tuple(slice(o, o + n) for o, n in zip(r.offset, r.size, strict=True))
            r.view(shard.weights.detach()).copy_(numbers[r.name][where])
    whole = {p: safe_get_full_fp32_param(p) for p in engine.model.parameters()}
    return all(
        torch.equal(local_block(whole[p], part), numbers[part.name].float())
        for p, part in parameter_parts(engine.model)
    )


def refused(function: Callable[[], object], error: type[Exception]) -> bool:
    try:
        function()
    except error:
        return True
    return False


def observe(folder: Path) -> None:
    seen: dict[str, Any] = {}
    persistent = make(zero_stage=3, param_persistence_threshold=10**9)
    seen["tensors"] = len(list(persistent.model.parameters()))
    seen["gathers of persistent tensors"], seen["by the update"] = first_gathers(persistent)
    seen["gathers"], seen["by the update of a step"] = first_gathers(
        make(zero_stage=3, param_persistence_threshold=10**9, gather="step")
    )

    engine = make(zero_stage=3)
    seen["norm"], seen["two backwards"] = norm(engine), norm_of_two_backwards_in_a_row(engine)
    scale, engine.gradient_scale = engine.gradient_scale, 1.0
    seen["norm, unscaled"] = norm(engine)
    engine.gradient_scale = scale
    engine.zero_optimizer.clear_backward_seen_flag = lambda: None
    seen["two backwards, flag kept"] = norm_of_two_backwards_in_a_row(engine)

    engine = make(zero_stage=1, tensor=2)
    seen["tensor"] = norm(engine)
    for parameter in engine.model.parameters():
        parameter.model_parallel = True  # type: ignore[attr-defined]
    seen["tensor, replicas counted twice"] = norm(engine)

    alone = refused(lambda: assert_ints_same_as_other_ranks([dist.get_rank()]), RuntimeError)
    seen["other numbers refused"] = engine.layout.any_rank(alone)
    groups._create_zero_param_parallel_group(2)
    seen["second group refused"] = refused(lambda: groups._create_zero_param_parallel_group(2), AssertionError)

    seen["gathers, most live parameters"], _ = first_gathers(with_settings(3, **MOST_LIVE))
    seen["refused"] = refused(lambda: with_settings(1, overlap_comm=True), AssertionError)
    for stage in (2, 3):
        seen["overlap", stage] = []
        for overlaps in (False, True):  # the groups of an engine end when the next one starts
            engine = with_settings(stage, overlap_comm=overlaps)
            assert engine.deepspeed_engine.zero_overlap_comm() == overlaps
            seen["overlap", stage].append((train(engine, range(3)), norm_of_two_backwards_in_a_row(engine)))
    seen["kept"] = kept_until_the_update(make(zero_stage=3, gather="step"))
    seen["kept, for each micro-batch"] = kept_until_the_update(make(zero_stage=3))
    seen["found"] = [shards_are_where_we_think(make(zero_stage=stage)) for stage in (1, 2, 3)]

    disk = {"offload_optimizer": "nvme", "offload_parameters": "nvme", "offload_folder": str(folder / "offloaded")}
    engine = make(zero_stage=3, **disk)
    seen["norm, on the disk"] = norm(engine)
    flats, swapper = (
        engine.zero_optimizer.fp32_partitioned_groups_flat,
        SimpleNamespace(optimizer=engine.zero_optimizer.optimizer),
    )
    seen["sub-groups"] = len(flats)
    seen["state to swap"] = [len(OptimizerSwapper._get_state_tensors(swapper, flat)) for flat in flats]

    engine = make(zero_stage=3, pipeline=2, virtual_stages=2)
    seen["interleaved"] = norm(engine)
    engine._zero_gradients = lambda: None  # type: ignore[method-assign]
    seen["interleaved, gradients not zeroed"] = norm(engine)
    if engine.layout.rank == 0:
        torch.save(seen, results_file(folder, "seen"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workarounds")
    run_world(2, observe, folder)
    return torch.load(results_file(folder, "seen"))


def test_the_version_that_was_looked_at() -> None:
    assert deepspeed.__version__.startswith("0.19."), "read parallel/engine/zero.py again beside this DeepSpeed"


def test_private_names_are_where_we_reach_for_them() -> None:
    assert constants.MANAGED_GRADIENT_ACCUMULATION == "managed_gradient_accumulation"
    assert constants.ZERO_FORCE_DS_CPU_OPTIMIZER == "zero_force_ds_cpu_optimizer"
    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        assert hasattr(module, "assert_ints_same_as_other_ranks"), module
    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer):
        assert callable(kind.clear_backward_seen_flag) and callable(kind.backward_prologue)
    assert callable(BF16_Optimizer.update_lp_params)
    assert callable(DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters)
    for name in ("__param_id_to_grad_partition", "micro_step_id", "grad_position", "fp32_partitioned_groups_flat"):
        assert f"self.{name}" in inspect.getsource(DeepSpeedZeroOptimizer_Stage3), name
    assert "ds_active_sub_modules" in inspect.getsource(partitioned_param_coordinator.PartitionedParameterCoordinator)
    assert hasattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP")


def test_gradients_are_averaged(seen: dict[str, Any]) -> None:
    assert seen["norm, unscaled"] == pytest.approx(seen["norm"] / 2, rel=1e-5)


def test_model_parallel_states_what_is_counted(seen: dict[str, Any]) -> None:
    assert seen["tensor, replicas counted twice"] > seen["tensor"] * (1 + 1e-4)


def test_module_numbers_are_compared_over_the_world(seen: dict[str, Any]) -> None:
    assert seen["other numbers refused"]


def test_two_backwards_in_a_row_overwrite(seen: dict[str, Any]) -> None:
    assert seen["two backwards"] == pytest.approx(seen["norm"], rel=1e-5)
    assert seen["two backwards, flag kept"] != pytest.approx(seen["norm"], rel=1e-3)


def test_the_second_stage_of_a_rank_adds_to_old_gradients(seen: dict[str, Any]) -> None:
    assert seen["interleaved, gradients not zeroed"] != pytest.approx(seen["interleaved"], rel=1e-3)


def test_persistent_tensors_are_released_until_the_order_is_known(seen: dict[str, Any]) -> None:
    assert 0 < seen["gathers"] < seen["gathers of persistent tensors"]


def test_an_update_gathers_persistent_tensors_one_by_one(seen: dict[str, Any]) -> None:
    assert seen["by the update"] == seen["tensors"]
    assert seen["by the update of a step"] == 0


def test_live_parameters_are_released_until_the_order_is_known(seen: dict[str, Any]) -> None:
    assert seen["gathers"] < seen["gathers, most live parameters"]


def test_communication_overlaps_where_gradients_are_partitioned_and_changes_nothing(seen: dict[str, Any]) -> None:
    """Of stages 2 and 3, though DeepSpeed's message names stage 2 only; a CPU has no streams, so this is the order."""
    assert seen["refused"]
    for stage in (2, 3):
        in_line, overlapped = seen["overlap", stage]
        assert overlapped == in_line


def test_parameters_are_kept_by_the_step_and_given_back_by_the_update(seen: dict[str, Any]) -> None:
    assert seen["kept"] == (True, False)
    assert seen["kept, for each micro-batch"] == (False, False)


def test_deepspeed_would_swap_one_sub_group_without_its_state(seen: dict[str, Any]) -> None:
    assert seen["sub-groups"] == 1
    assert seen["state to swap"] == [0]
    assert seen["norm, on the disk"] == pytest.approx(seen["norm"], rel=1e-5)


def test_shards_are_found(seen: dict[str, Any]) -> None:
    assert seen["found"] == [True, True, True]


def test_deepspeed_gives_values_but_not_where_they_lie() -> None:
    kinds = ("fp32_param", "grad", "optimizer_state")
    gives = {f"safe_get_{where}_{what}" for where in ("full", "local") for what in kinds}
    assert {name for name in dir(deepspeed.utils) if name.startswith("safe_get_")} == gives


def test_nearby_ranks_are_grouped_once_a_process(seen: dict[str, Any]) -> None:
    assert seen["second group refused"]
