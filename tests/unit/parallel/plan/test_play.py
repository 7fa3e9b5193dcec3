"""Played schedules: torch's own actions, the textbook's bubble where stages are equal, and what kept memory needs."""

import random
from itertools import pairwise

import pytest

from model.costs import BatchShape
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.actions import BACKWARD, FORWARD, Pipeline, actions
from parallel.plan.memory import MemoryModel, StepShape
from parallel.plan.play import StageTime, kept_counts, play, step_s

PIPELINES = [Pipeline(2, 1, 4, "gpipe"), Pipeline(2, 1, 8, "1f1b"), Pipeline(4, 1, 4, "1f1b"),
             Pipeline(4, 1, 3, "1f1b"), Pipeline(2, 2, 4, "1f1b"), Pipeline(4, 2, 8, "1f1b"),
             Pipeline(3, 2, 7, "1f1b")]  # fmt: skip
LONG = [Pipeline(4, 1, 100, "1f1b"), Pipeline(4, 2, 100, "1f1b"), Pipeline(3, 1, 99, "gpipe")]


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_every_pass_runs_once_and_after_its_inputs(pipeline: Pipeline) -> None:
    timeline = play(pipeline, [StageTime(1.0, 2.0, 0.25, 0.5)] * pipeline.stages)
    ends = {(s.kind, s.stage, s.micro_batch): (s.start_s, s.end_s) for s in timeline.spans}
    assert len(ends) == len(timeline.spans) == 2 * pipeline.stages * pipeline.run_micro_batches
    for (kind, stage, number), (start, _) in ends.items():
        before = (kind, stage - 1 if kind == FORWARD else stage + 1, number)
        if before in ends:
            assert start >= ends[before][1] + (0.25 if kind == FORWARD else 0.5) - 1e-9
        if kind == BACKWARD:
            assert start >= ends[FORWARD, stage, number][1] - 1e-9
    for rank in range(pipeline.ranks):
        own = [s for s in timeline.spans if s.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in pairwise(own))


@pytest.mark.parametrize("pipeline", [p for p in PIPELINES if p.micro_batches % p.ranks == 0], ids=str)
def test_equal_stages_have_the_bubble_of_the_textbook(pipeline: Pipeline) -> None:
    """(p - 1) / (v m + p - 1), Narayanan et al. 2021, section 2.2."""
    p, v, m = pipeline.ranks, pipeline.virtual_stages, pipeline.micro_batches
    timeline = play(pipeline, [StageTime(1.0 / v, 2.0 / v)] * pipeline.stages)
    assert 1 - timeline.busy_s(0) / timeline.seconds == pytest.approx((p - 1) / (v * m + p - 1), rel=1e-9)


@pytest.mark.parametrize(
    "pipeline", [Pipeline(4, 1, 40, "1f1b"), Pipeline(4, 2, 40, "1f1b"), Pipeline(3, 1, 33, "gpipe")]
)
def test_a_long_schedule_is_continued(pipeline: Pipeline) -> None:
    draw = random.Random(0)
    for _ in range(5):
        stages = [StageTime(draw.uniform(1, 3), draw.uniform(0, 6), draw.random(), draw.random())
                  for _ in range(pipeline.stages)]  # fmt: skip
        assert step_s(pipeline, stages) == pytest.approx(play(pipeline, stages).seconds, rel=1e-2)


@pytest.mark.parametrize("pipeline", PIPELINES, ids=str)
def test_kept_micro_batches_are_those_of_the_memory_model(pipeline: Pipeline) -> None:
    config = ParallelConfig(pipeline=pipeline.ranks, virtual_stages=pipeline.virtual_stages, schedule=pipeline.schedule)
    memory = MemoryModel(config, OptimizerConfig(), StepShape(BatchShape(1, 1, 1, 1, 1), pipeline.micro_batches), 1)
    for rank, moments in enumerate(kept_counts(pipeline)):
        for own in range(pipeline.virtual_stages):
            assert max(kept[own] for _, kept in moments) == memory.in_flight(rank + own * pipeline.ranks)


def test_actions_are_recorded_without_a_process_group_and_unevenness_costs() -> None:
    pipeline = Pipeline(2, 1, 8, "1f1b")
    assert len(actions(pipeline)) == 2
    even = play(pipeline, [StageTime(1, 2)] * 2).seconds
    uneven = play(pipeline, [StageTime(0.5, 1), StageTime(1.5, 3)]).seconds
    frozen = play(pipeline, [StageTime(1, 0), StageTime(1, 2)]).seconds
    assert frozen < even < uneven
