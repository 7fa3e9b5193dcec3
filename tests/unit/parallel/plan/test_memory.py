"""Predicted memory: what every option does to it, against real schedules and a real engine, on sizes of the paper."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _ComputationType

from common.errors import ConfigurationError
from model.costs import BatchShape, unit_costs
from model.describe import Sizes, read_sizes
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.base import DTYPES, build_engine
from parallel.layout import Layout
from parallel.plan.blueprint import plan_of
from parallel.plan.cut import StageCost, table
from parallel.plan.memory import Memory, Work
from tests.distributed.problem import MODEL, MT5, NUM_OBJECTIVES, VIT, micro_batches

ADAMW, ADAFACTOR = OptimizerConfig("adamw"), OptimizerConfig()
WORK = Work(
    BatchShape(images=8, vision_tokens=256, rows=8, encoder_tokens=320, decoder_tokens=64), num_micro_batches=16
)
GIB = 2**30


@pytest.fixture(scope="module")
def pali_3b() -> Sizes:
    return read_sizes(["model=pali_3b", "stage=full_224"])


def stages_of(
    sizes: Sizes,
    optimizer: OptimizerConfig = ADAFACTOR,
    work: Work = WORK,
    precision: str = "bf16",
    data: int = 4,
    **parallel: Any,
) -> list[StageCost]:
    config = ParallelConfig(**{"pipeline": 4, **parallel})
    return plan_of(
        sizes.vit, sizes.mt5, sizes.model, optimizer, config, frozen=sizes.frozen, data_parallel_size=data,
        dtype=DTYPES[precision], work=work,
    )[1]  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "optimizer", "options", "trained", "frozen"),
    [  # bytes of one parameter on one of 4 data-parallel ranks
        ("fp32", ADAFACTOR, {}, 4 + 4, 4),
        ("fp32", ADAMW, {}, 4 + 4 + 8, 4),
        ("bf16", ADAFACTOR, {}, 2 + 4 + 4, 2),
        ("bf16", ADAMW, {}, 2 + 4 + 4 + 8, 2),
        ("bf16", OptimizerConfig(momentum=0.9), {}, 2 + 4 + 4 + 2, 2),
        ("bf16", ADAMW, {"zero_stage": 1}, 2 + 4 + (4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 2}, 2 + (4 + 4 + 8) / 4, 2),
        ("bf16", ADAMW, {"zero_stage": 3}, (2 + 4 + 4 + 8) / 4, 2 / 4),
        ("bf16", ADAMW, {"zero_stage": 3, "tensor": 2}, (2 + 4 + 4 + 8) / 8, 2 / 8),
        ("bf16", ADAMW, {"zero_stage": 3, "gather": "step"}, 2 + (2 + 4 + 4 + 8) / 4, 2 + 2 / 4),
        ("bf16", ADAMW, {"zero_stage": 3, "hpz_partition_size": 2}, 2 / 2 + (2 + 4 + 4 + 8) / 4, 2 / 2 + 2 / 4),
        ("bf16", ADAMW, {"zero_stage": 1, "offload_optimizer": "cpu"}, 2, 2),
        ("bf16", ADAMW, {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, 0, 0),
    ],
)
def test_bytes_of_a_parameter(
    pali_3b: Sizes, precision: str, optimizer: OptimizerConfig, options: dict[str, Any], trained: float, frozen: float
) -> None:
    nothing = Work(BatchShape(0, 256, 0, 0, 0), 1)
    cut_at = {"pipeline": 2, "cut": ["bridge"]}
    pali_3b = Sizes(pali_3b.vit, pali_3b.mt5, pali_3b.model, ["patches.*", "vit_block_*"])
    vit, mt5 = stages_of(pali_3b, optimizer, nothing, precision, **cut_at, **options)
    assert vit.memory_bytes == pytest.approx(frozen * vit.parameters)
    assert mt5.memory_bytes == pytest.approx(trained * mt5.parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", [OptimizerConfig(min_dim_size_to_factor=16), ADAMW], ids=["adafactor", "adamw"])
def test_a_real_engine_holds_what_is_predicted(precision: str, optimizer: OptimizerConfig) -> None:
    layout = Layout(ParallelConfig(), launch())
    engine: Any = build_engine(
        VIT, MT5, MODEL, optimizer, layout=layout, num_objectives=NUM_OBJECTIVES, precision=precision
    )
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    engine.update(0.0)
    engine.forward_backward(micro_batches(0)[:2], num_targets=100)
    gradients = engine.accumulated or [p.grad for p in engine.trained]
    held = [*engine.trained, *engine.weights, *gradients, *(values for _, _, values in engine.optimizer.state_pieces())]
    memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    work = Work(BatchShape(0, 4, 0, 0, 0, DTYPES[precision].itemsize), 1)
    stored = sum(map(Memory(layout.config, optimizer, work, 1).stored, unit_costs(engine.model.units(), work.shape)))
    assert sum(memory.values()) == pytest.approx(stored, rel=0.03)  # at these sizes Adafactor's moments are 2 %


def in_flight(micro_batches: int = 16, **options: Any) -> list[int]:
    config = ParallelConfig(**{"pipeline": 4, **options})
    memory = Memory(config, ADAFACTOR, Work(WORK.shape, micro_batches), 1)
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
    memory = Memory(config, ADAFACTOR, Work(WORK.shape, micro_batches), 1)
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


def test_a_rank_is_told_the_sum_of_its_stages(pali_3b: Sizes) -> None:
    stages = stages_of(pali_3b, virtual_stages=2)
    assert [stage.memory_bytes for stage in stages[:4]] == [stage.memory_bytes for stage in stages[4:]]
    one = [stage.parameters * 10 for stage in stages]  # bytes, bf16 and Adafactor
    assert all(stage.memory_bytes > one[i] + one[i + 4] for i, stage in enumerate(stages[:4]))


def test_longer_rows_more_rows_and_gpipe_take_more_and_recomputation_less(pali_3b: Sizes) -> None:
    def most(work: Work = WORK, **options: Any) -> float:
        return max(stage.memory_bytes for stage in stages_of(pali_3b, work=work, **options))

    longer = Work(BatchShape(8, 256, 8, 1024, 64), 16)
    wider = Work(BatchShape(16, 256, 16, 320, 64), 8)
    assert most(longer) > most() and most(wider) > most() and most(schedule="gpipe") > most()
    assert most(recompute="block") < most(recompute="attention") < most()


def test_no_rank_takes_more_than_it_may(pali_3b: Sizes) -> None:
    for options in ({}, {"virtual_stages": 2}, {"schedule": "gpipe"}):
        free = max(stage.memory_bytes for stage in stages_of(pali_3b, zero_stage=1, **options)) / GIB
        limit = 1.5 * free
        bounded = stages_of(pali_3b, zero_stage=1, memory_gib=limit, **options)
        assert max(stage.memory_bytes for stage in bounded) / GIB <= limit
        with pytest.raises(ConfigurationError, match=r"keeps every rank within parallel\.memory_gib=1\.0 GiB"):
            stages_of(pali_3b, zero_stage=1, memory_gib=1.0, **options)


def test_a_cut_by_hand_may_not_take_more_either(pali_3b: Sizes) -> None:
    names = ["bridge", "encoder_block_1", "decoder_block_0"]
    worst = max(stage.memory_bytes for stage in stages_of(pali_3b, cut=names)) / GIB
    assert stages_of(pali_3b, cut=names, memory_gib=worst + 0.001)
    with pytest.raises(ConfigurationError, match=rf"take {worst:.2f} GiB, more than parallel\.memory_gib=.* GiB; move"):
        stages_of(pali_3b, cut=names, memory_gib=worst - 0.001)


def test_the_table_shows_it(pali_3b: Sizes) -> None:
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
