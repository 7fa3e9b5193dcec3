"""Predicted memory: what every option does to it, against real schedules and a real engine, on sizes of the paper."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _ComputationType

from common.errors import ConfigurationError
from model.config import PaLIConfig
from model.costs import BatchShape, unit_costs
from model.describe import read_model
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.build import DTYPES, build_engine
from parallel.layout import Layout
from parallel.plan.blueprint import plan_stages
from parallel.plan.cut import StageCost, table
from parallel.plan.memory import MemoryModel, StepShape
from tests.distributed.problem import PALI, micro_batches

ADAMW, ADAFACTOR = OptimizerConfig("adamw"), OptimizerConfig()
STEP = StepShape(
    BatchShape(images=8, vision_tokens=256, rows=8, encoder_tokens=320, decoder_tokens=64), num_micro_batches=16
)
GIB = 2**30
CPU = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}


@pytest.fixture(scope="module")
def pali_3b() -> PaLIConfig:
    return read_model(["model=pali_3b", "phases=full_224"])[0]


def stages_of(
    config: PaLIConfig,
    optimizer: OptimizerConfig = ADAFACTOR,
    step: StepShape = STEP,
    precision: str = "bf16",
    frozen: Sequence[str] = (),
    **parallel: Any,
) -> list[StageCost]:
    step = replace(step, micro_batch=replace(step.micro_batch, element_bytes=DTYPES[precision].itemsize))
    memory = MemoryModel(ParallelConfig(**{"pipeline": 4, **parallel}), optimizer, step, data_parallel_size=4)
    return plan_stages(config, frozen, memory)[1]


@pytest.mark.parametrize(
    ("precision", "optimizer", "options", "trained", "frozen"),
    [  # bytes of one parameter on one of 4 data-parallel ranks
        ("fp32", ADAFACTOR, {}, 4 + 4, 4),
        ("fp32", ADAMW, {}, 4 + 4 + 8, 4),
        ("bf16", ADAFACTOR, {}, 2 + 4 + 4, 2),
        ("bf16", ADAMW, {}, 2 + 4 + 4 + 8, 2),
        ("bf16", OptimizerConfig(momentum=0.9), {}, 2 + 4 + 4 + 2, 2),
        ("bf16", ADAMW, {"zero_stage": 1}, 2 + (4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 2, "reduce": "micro_batch"}, 2 + (4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 3}, (2 + 4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 3, "shard_frozen": True}, (2 + 4 + 4 + 8) / 4, 2 / 4),
        ("bf16", ADAMW, {"zero_stage": 3, "tensor": 2}, (2 + 4 + 4 + 8) / 8, 2 / 2),
        ("bf16", ADAMW, {"zero_stage": 3, "tensor": 2, "replicate_frozen_vit": True}, (2 + 4 + 4 + 8) / 8, 2),
        ("bf16", ADAMW, {"zero_stage": 3, "gather": "step"}, 2 + (2 + 4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 3, "hpz_partition_size": 2}, 2 / 2 + (2 + 4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 1, "offload_optimizer": "cpu"}, 2, 2),
        ("bf16", ADAMW, {"zero_stage": 3, "shard_frozen": True, **CPU}, 0, 0),
    ],
)
def test_bytes_of_a_parameter(
    pali_3b: PaLIConfig,
    precision: str,
    optimizer: OptimizerConfig,
    options: dict[str, Any],
    trained: float,
    frozen: float,
) -> None:
    nothing = StepShape(BatchShape(0, 256, 0, 0, 0), 1)
    cut_at = {"pipeline": 2, "cut": ["bridge"], "frozen": ["patches.*", "vit_block_*"]}
    vit, mt5 = stages_of(pali_3b, optimizer, nothing, precision, **cut_at, **options)
    assert vit.memory_bytes == pytest.approx(frozen * vit.parameters)
    assert mt5.memory_bytes == pytest.approx(trained * mt5.parameters)


@pytest.mark.parametrize(
    ("number", "options", "whole"),
    [  # whole fp32 gradients beside 2 + (4 + 4 + 8) / 4 bytes: those of several micro-batches, summed once a step
        (1, {"zero_stage": 1}, 0),
        (2, {"zero_stage": 1}, 4),
        (2, {"zero_stage": 2}, 4),
        (2, {"zero_stage": 2, "reduce": "micro_batch"}, 0),
        (2, {"zero_stage": 1, "offload_optimizer": "cpu"}, 4 - (4 + 4 + 8) / 4),
    ],
)
def test_micro_batches_are_added_up_whole_or_summed_over_ranks_one_by_one(
    number: int, options: dict[str, Any], whole: float
) -> None:
    memory = MemoryModel(ParallelConfig(**options), ADAMW, replace(STEP, num_micro_batches=number), 4)
    assert memory.stored_bytes(2.0, 1.0) == 2 * STEP.micro_batch.element_bytes + (4 + 4 + 8) / 4 + whole
    alone = MemoryModel(ParallelConfig(zero_stage=1), ADAMW, replace(STEP, num_micro_batches=number), 1)
    assert alone.update_bytes() == 4 + 4 + 8  # the only rank's sum is what it has added up


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [OptimizerConfig(min_dim_size_to_factor=16), ADAMW], ids=["adafactor", "adamw"])
def test_a_real_engine_holds_what_is_predicted(precision: str, optimizer: OptimizerConfig) -> None:
    layout = Layout.start(ParallelConfig(), launch())
    engine: Any = build_engine(PALI, optimizer, layout, precision=precision)
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    engine.update(0.0)
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    gradients = engine.accumulated or [p.grad for p in engine.trained]
    held = [*engine.trained, *engine.weights, *gradients, *(values for _, _, values in engine.optimizer.state_pieces())]
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    step = StepShape(BatchShape(0, 4, 0, 0, 0, DTYPES[precision].itemsize), 1)
    predicted = MemoryModel(layout.config, optimizer, step, 1)
    stored = sum(map(predicted.stored, unit_costs(engine.model.units(), step.micro_batch)))
    assert sum(memory.values()) == pytest.approx(stored, rel=0.03)  # at these sizes Adafactor's moments are 2 %


def test_a_step_of_one_example_a_row_fills_the_pipeline(pali_3b: PaLIConfig) -> None:
    """16 x 16 patches of 224 pixels, 32 tokens of text on both sides."""
    parallel = ParallelConfig(pipeline=4, virtual_stages=2, micro_batch_size=3)
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        step = StepShape.from_one_example(pali_3b, parallel, dtype)
        assert step == StepShape(BatchShape(3, 256, 3, 256 + 32, 32, size), 8)


def in_flight(micro_batches: int = 16, **options: Any) -> list[int]:
    config = ParallelConfig(**{"pipeline": 4, **options})
    memory = MemoryModel(config, ADAFACTOR, StepShape(STEP.micro_batch, micro_batches), 1)
    return [memory.in_flight(stage) for stage in range(config.pipeline * config.virtual_stages)]


def test_micro_batches_in_flight() -> None:
    assert in_flight() == [4, 3, 2, 1]
    assert in_flight(schedule="gpipe") == [16, 16, 16, 16]
    assert in_flight(micro_batches=4) == [4, 3, 2, 1]  # just enough for 1F1B
    assert in_flight(micro_batches=3) == [3, 3, 3, 3]  # too few
    assert in_flight(pipeline=1) == [1] and in_flight(pipeline=1, schedule="gpipe") == [1]


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(2, 2, 8), (4, 2, 8), (4, 3, 12), (3, 2, 6), (2, 2, 2)]
)
def test_interleaved_stages_keep_what_torchs_schedule_keeps(pipeline: int, virtual: int, micro_batches: int) -> None:
    config = ParallelConfig(pipeline=pipeline, virtual_stages=virtual)
    memory = MemoryModel(config, ADAFACTOR, StepShape(STEP.micro_batch, micro_batches), 1)
    sizes = [10.0, 1.0, 3.0][:virtual]
    schedule: Any = SimpleNamespace(
        n_local_stages=virtual, pp_group_size=pipeline, _n_microbatches=micro_batches, microbatches_per_round=pipeline
    )
    for rank in range(pipeline):
        now = most = 0.0
        for action in ScheduleInterleaved1F1B._calculate_single_rank_operations(schedule, rank):
            if action is not None:
                size = sizes[action.stage_index // pipeline]
                now += size if action.computation_type == _ComputationType.FORWARD else -size
                most = max(most, now)
        assert now == 0 and memory.kept(sizes, rank) == most


def test_a_rank_takes_the_sum_of_its_stages(pali_3b: PaLIConfig) -> None:
    stages = stages_of(pali_3b, virtual_stages=2)
    assert [stage.memory_bytes for stage in stages[:4]] == [stage.memory_bytes for stage in stages[4:]]
    one = [stage.parameters * 10 for stage in stages]  # bytes, bf16 and Adafactor
    assert all(stage.memory_bytes > one[i] + one[i + 4] for i, stage in enumerate(stages[:4]))


def test_longer_rows_more_rows_and_gpipe_take_more_and_recomputation_less(pali_3b: PaLIConfig) -> None:
    def most(step: StepShape = STEP, **options: Any) -> float:
        return max(stage.memory_bytes for stage in stages_of(pali_3b, step=step, **options))

    longer = StepShape(BatchShape(8, 256, 8, 1024, 64), 16)
    wider = StepShape(BatchShape(16, 256, 16, 320, 64), 8)
    assert most(longer) > most() and most(wider) > most() and most(schedule="gpipe") > most()
    assert most(recompute="block") < most(recompute="attention") < most()


def test_no_rank_takes_more_than_it_may(pali_3b: PaLIConfig) -> None:
    for options in ({}, {"virtual_stages": 2}, {"schedule": "gpipe"}):
        free = max(stage.memory_bytes for stage in stages_of(pali_3b, zero_stage=1, **options)) / GIB
        limit = 1.5 * free
        bounded = stages_of(pali_3b, zero_stage=1, memory_gib=limit, **options)
        assert max(stage.memory_bytes for stage in bounded) / GIB <= limit
        with pytest.raises(ConfigurationError, match=r"keeps every rank within parallel\.memory_gib=1\.0 GiB"):
            stages_of(pali_3b, zero_stage=1, memory_gib=1.0, **options)


def test_a_cut_by_hand_may_not_take_more_either(pali_3b: PaLIConfig) -> None:
    names = ["bridge", "encoder_block_1", "decoder_block_0"]
    worst = max(stage.memory_bytes for stage in stages_of(pali_3b, cut=names)) / GIB
    assert stages_of(pali_3b, cut=names, memory_gib=worst + 0.001)
    with pytest.raises(ConfigurationError, match=rf"take {worst:.2f} GiB, more than parallel\.memory_gib=.* GiB; move"):
        stages_of(pali_3b, cut=names, memory_gib=worst - 0.001)


def test_the_table_shows_it(pali_3b: PaLIConfig) -> None:
    """Of mT5-large and ViT-G: 256.1 M of embeddings at each end, 24 blocks of 12.8 M and of 17.0 M."""
    stages = stages_of(pali_3b, cut=["bridge", "decoder_block_0", "decoder_block_12"])
    rows = list(zip(*(column.cells for column in table(stages).columns), strict=True))
    assert [row[:3] for row in rows] == [
        ("0", "patches .. vit_block_47 (49)", "1,842.8 M"),
        ("1", "bridge .. encoder_norm (26)", "566.2 M"),
        ("2", "decoder_block_0 .. decoder_block_11 (12)", "204.5 M"),
        ("3", "decoder_block_12 .. head (13)", "460.6 M"),
    ]
    flops = [stage.flops for stage in stages]
    assert [row[3] for row in rows] == [f"{each / 1e12:.4f}" for each in flops]
    assert [row[4] for row in rows] == [f"{each / sum(flops):.0%}" for each in flops]
    assert [row[5] for row in rows] == [f"{stage.memory_bytes / GIB:.2f} GiB" for stage in stages]
    single = table(stages_of(pali_3b, pipeline=2, cut=["head"]))
    assert list(single.columns[1].cells)[1] == "head"
