"""Played schedules: torch's own actions, the textbook's bubble where stages are equal, and what kept memory needs."""

import random
from itertools import pairwise

import pytest

from model.costs import BatchShape
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan import play as module
from parallel.plan.actions import BACKWARD, FORWARD, Action, Message, Pipeline, actions
from parallel.plan.memory import MemoryModel, StepShape
from parallel.plan.play import Span, StageTime, kept_counts, play, step_s

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


ORDERS = {  # passes of every rank: a stage of its own with a, b, ...; capital letters are backward passes
    Pipeline(2, 1, 3, "1f1b"): ["a0 a1 A0 a2 A1 A2", "a0 A0 a1 A1 a2 A2"],
    Pipeline(2, 1, 2, "1f1b"): ["a0 a1 A0 A1", "a0 A0 a1 A1"],
    Pipeline(3, 1, 2, "1f1b"): ["a0 a1 A0 A1"] * 3,  # fewer micro-batches than stages: GPipe
    Pipeline(2, 1, 3, "gpipe"): ["a0 a1 a2 A0 A1 A2"] * 2,
    Pipeline(2, 2, 1, "1f1b"): ["a0 a1 b0 b1 B0 B1 A0 A1", "a0 a1 b0 B0 b1 B1 A0 A1"],  # filled up to two micro-batches
}


@pytest.mark.parametrize("pipeline", ORDERS, ids=str)
def test_the_order_of_passes_is_that_of_the_schedule(pipeline: Pipeline) -> None:
    orders = []
    for rank, own in enumerate(actions(pipeline)):
        passes = [messages[0] for do, messages in own if do == "compute"]
        names = [("abc" if kind == FORWARD else "ABC")[(stage - rank) // pipeline.ranks] for kind, stage, _ in passes]
        orders.append(" ".join(f"{name}{number}" for name, (_, _, number) in zip(names, passes, strict=True)))
    assert orders == ORDERS[pipeline]


@pytest.mark.parametrize("pipeline", [*PIPELINES, *LONG], ids=str)
def test_every_message_is_posted_by_both_ranks_and_waited_for_before_its_pass(pipeline: Pipeline) -> None:
    posted: dict[Message, list[int]] = {}
    for rank, own in enumerate(actions(pipeline)):
        arrived: set[Message] = set()
        for do, messages in own:
            if do == "post":
                for message in messages:
                    posted.setdefault(message, []).append(rank)
            elif do == "wait":
                arrived.update(messages)
            else:
                kind, stage, _ = messages[0]
                first, last = stage == 0, stage == pipeline.stages - 1
                assert messages[0] in arrived or (first if kind == FORWARD else last)
    p, numbers = pipeline.ranks, range(pipeline.run_micro_batches)
    expected = {Message(FORWARD, stage, n): {(stage - 1) % p, stage % p} for stage in range(1, pipeline.stages)
                for n in numbers} | {Message(BACKWARD, stage, n): {stage % p, (stage + 1) % p}
                                     for stage in range(pipeline.stages - 1) for n in numbers}  # fmt: skip
    assert {message: set(ranks) for message, ranks in posted.items()} == expected
    assert all(len(ranks) == 2 for ranks in posted.values())


def test_two_stages_by_hand() -> None:
    """Rank 0 computes 1 s forward, 2 s backward, rank 1 3 s and 4 s; messages take 10 s and 20 s."""
    timeline = play(Pipeline(2, 1, 1, "1f1b"), [StageTime(1, 2, 99, 20), StageTime(3, 4, 10, 99)])
    assert timeline.spans == (
        Span(0, FORWARD, 0, 0, 0, 1), Span(1, FORWARD, 1, 0, 11, 14), Span(1, BACKWARD, 1, 0, 14, 18),
        Span(0, BACKWARD, 0, 0, 38, 40),
    )  # fmt: skip
    assert timeline.seconds == 40 and (timeline.busy_s(0), timeline.busy_s(1)) == (3, 7)


def test_a_message_starts_when_both_ranks_have_posted_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Message(FORWARD, 1, 0), Message(FORWARD, 0, 0)
    post, wait, compute = Action("post", (a,)), Action("wait", (a,)), Action("compute", (b,))
    plan: dict[str, list[list[Action]]] = {
        "receiver is late": [[post, wait], [compute, post, wait]],
        "sender is late": [[compute, post, wait], [post, wait]],
    }
    for name, own in plan.items():
        monkeypatch.setattr(module, "actions", lambda _, own=own: own)
        assert play(Pipeline(2, 1, 1, "1f1b"), [StageTime(5, 0), StageTime(0, 0, 2)]).seconds == 7, name
    monkeypatch.setattr(module, "actions", lambda _: [[wait, post], [wait, post]])
    with pytest.raises(RuntimeError, match=r"the ranks of Pipeline\(ranks=2, .*\) wait for each other forever"):
        play(Pipeline(2, 1, 1, "1f1b"), [StageTime(1, 1)] * 2)


def test_ranks_that_wait_in_turn_are_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three ranks goes on first, so the others find nothing to do for a round."""
    a, b = Message(FORWARD, 1, 0), Message(FORWARD, 2, 0)
    own = [
        [Action("wait", (a,)), Action("post", (a,))],
        [Action("post", (a,)), Action("wait", (b,)), Action("post", (b,))],
        [Action("post", (b,)), Action("wait", (b,))],
    ]
    own[0] = [Action("post", (a,)), Action("wait", (a,))]
    monkeypatch.setattr(module, "actions", lambda _: own)
    with pytest.raises(RuntimeError):  # rank 1 waits for the message that it would post
        play(Pipeline(3, 1, 1, "1f1b"), [StageTime(1, 1)] * 3)
    own[1] = [Action("post", (a,)), Action("wait", (a,)), Action("post", (b,)), Action("wait", (b,))]
    assert play(Pipeline(3, 1, 1, "1f1b"), [StageTime(1, 1, 2)] * 3).seconds == 4


def test_one_rank_plays_nothing_and_a_short_schedule_is_played_whole() -> None:
    assert step_s(Pipeline(1, 1, 5, "1f1b"), [StageTime(1, 2)]) == 15
    stages = [StageTime(1.0, 2.5, 0.3, 0.2), StageTime(1.5, 2.0, 0.1, 0.4)]
    for pipeline in (Pipeline(2, 1, 20, "1f1b"), Pipeline(2, 1, 3, "gpipe")):
        assert step_s(pipeline, stages) == play(pipeline, stages).seconds
    equal = [StageTime(1.0, 2.0)] * 4
    for pipeline in LONG[:2]:  # equal stages: exact, (p - 1) / v passes of all stages more than the micro-batches
        p, v = pipeline.ranks, pipeline.virtual_stages
        assert step_s(pipeline, equal * v) == pytest.approx(3 * (100 * v + p - 1))


def test_kept_micro_batches_pass_by_pass() -> None:
    """A pass's own micro-batch counts while it runs, in either direction."""
    first, last = kept_counts(Pipeline(2, 1, 3, "1f1b"))
    assert first == [("forward 0", (1,)), ("forward 0", (2,)), ("backward 0", (2,)), ("forward 0", (2,)),
                     ("backward 0", (2,)), ("backward 0", (1,))]  # fmt: skip
    assert last == [("forward 0", (1,)), ("backward 0", (1,))] * 3
    assert kept_counts(Pipeline(1, 1, 1, "1f1b")) == [[("forward 0", (1,)), ("backward 0", (1,))]]
    rank = kept_counts(Pipeline(2, 2, 2, "1f1b"))[1]
    assert rank[:4] == [("forward 0", (1, 0)), ("forward 0", (2, 0)), ("forward 1", (2, 1)), ("backward 1", (2, 1))]


def test_messages_are_filled_up_to_multiples_of_the_ranks() -> None:
    assert [Pipeline(4, 2, n, "1f1b").run_micro_batches for n in (1, 4, 5, 8)] == [4, 4, 8, 8]
    assert [Pipeline(4, 1, n, "1f1b").run_micro_batches for n in (1, 5)] == [1, 5]
    assert Pipeline(3, 2, 1, "1f1b").stages == 6
