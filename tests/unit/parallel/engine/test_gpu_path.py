"""A step's path on a GPU, with `meta` in its place, in every engine: its waits for the device, and its streams."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.unit.accelerator_on_meta import use_meta
from tests.unit.flights import Flights, followed
from tests.unit.gpu_on_meta import META, Waits, fake_group
from tests.unit.model.examples import PALI, example, micro_batch

FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
# The line waits for all work that the device has queued: another one needs a reason.
WAITS = {"parallel/engine/base.py: *values, squared = message.tolist()": 1}
SEQUENCE = {"tensor": 2, "sequence": True}
ZERO3 = {"zero_stage": 3, "param_persistence_threshold": 0}


def layout(**settings: Any) -> Layout:
    """Make the layout of rank 0 in a stage, with two data-parallel ranks; collectives do nothing."""
    parallel = ParallelConfig(recompute="block", **{k: v for k, v in settings.items() if k != "stage"})
    tensor, stage, pipeline = parallel.tensor, settings.get("stage", 0), parallel.pipeline
    rank, width, size = 2 * tensor * stage, 2 * tensor, 2 * tensor * pipeline
    dist.group.WORLD = world = fake_group(rank, size, "world", range(size))
    return Layout(
        parallel, META, rank, size,
        tensor_group=fake_group(0, tensor, "tensor", range(rank, rank + tensor)),
        pipeline_group=fake_group(stage, pipeline, "pipeline", range(0, size, width)),
        data_group=fake_group(0, 2, "data", range(rank, rank + width, tensor)),
        model_group=fake_group(stage * tensor, tensor * pipeline, "model", range(tensor * pipeline)),
        stage_group=world if pipeline == 1 else fake_group(0, width, "stage", range(rank, rank + width)),
    )  # fmt: skip


def engine_on(settings: dict[str, Any], optimizer: str = "adafactor") -> Engine:
    config = OptimizerConfig(name=optimizer, gradient_clipping=0.5)
    return build_engine(PALI, config, layout(**settings), precision="bf16", freeze=FROZEN_VIT, seed=None)


@dataclass
class Step:
    """The collectives of a step, and how many of those in the stream that computes come before and after `measure`."""

    flights: Flights
    before: int
    after: int

    def counts(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Count collectives by kind and group, and those beside which no matrix product begins.

        Those of tensor parallelism are left out: the layers call them (tests/unit/model).
        """
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for flight in self.flights.landed + self.flights.in_the_way:
            if flight.group != "tensor":
                number, alone = found.get((flight.kind, flight.group), (0, 0))
                found[flight.kind, flight.group] = number + 1, alone + (flight.products == 0)
        return found

    def joined(self) -> list[torch.dtype]:
        """Return the dtype of each collective over tensor ranks between backward pass and update."""
        return [
            flight.dtype for flight in self.flights.in_the_way[self.before : self.after] if flight.group == "tensor"
        ]


def step(engine: Engine) -> Step:
    batches = [micro_batch([[example(1), example(2, images=0)], [example(3, images=2)]], 60, 20) for _ in range(2)]
    with followed() as flights:
        totals = engine.forward_backward(batches, 64)
        before = len(flights.in_the_way)
        engine.measure(totals)
        after = len(flights.in_the_way)
        engine.update(1e-3)
    assert not flights.flying, "a collective that nobody waits for"
    return Step(flights, before, after)


SUM, SCATTER, GATHER, MESSAGE = "all-reduce", "reduce-scatter", "all-gather", "message"
# Buckets and gathers are units here: eight are trained. Of a step's sums over the world, one is that of the loss, one
# the norm, and two are Adafactor's where it has shards.
CASES: list[tuple[dict[str, Any], str, dict[tuple[str, str], tuple[int, int]]]] = [
    ({}, "adafactor", {(SUM, "world"): (1, 1), (SUM, "data"): (1, 1)}),
    (SEQUENCE, "adamw", {(SUM, "world"): (1, 1), (SUM, "data"): (1, 1), (SUM, "model"): (1, 1)}),
    (
        {**SEQUENCE, "zero_stage": 1},
        "adafactor",
        {(SCATTER, "data"): (8, 1), (GATHER, "data"): (8, 8), (SUM, "world"): (4, 4)},
    ),
    (
        {**SEQUENCE, "zero_stage": 2, "reduce": "micro_batch"},
        "adamw",
        {(SCATTER, "data"): (16, 1), (GATHER, "data"): (8, 8), (SUM, "world"): (2, 2)},
    ),
    (  # 8 + 7 a micro-batch; nothing is beside the first, and no product is in the encoder's norm or below the head.
        {**SEQUENCE, **ZERO3},
        "adafactor",
        {(SCATTER, "data"): (8, 1), (GATHER, "data"): (30, 8), (SUM, "world"): (4, 4)},
    ),
    (
        {**ZERO3, "gather": "step", "reduce_dtype": "bf16"},
        "adamw",
        {(SCATTER, "data"): (8, 1), (GATHER, "data"): (8, 2), (SUM, "world"): (2, 2)},
    ),
    (
        {**SEQUENCE, "pipeline": 2},
        "adafactor",
        {(MESSAGE, "pipeline"): (8, 4), (SUM, "world"): (1, 1), (SUM, "data"): (1, 1), (SUM, "model"): (1, 1)},
    ),
    (
        {"pipeline": 2, "stage": 1, "zero_stage": 1},
        "adafactor",
        {
            (MESSAGE, "pipeline"): (8, 8), (SCATTER, "data"): (4, 2), (GATHER, "data"): (4, 4),
            (SUM, "world"): (2, 2), (SUM, "stage"): (2, 2),
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "optimizer", "counts"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_step_waits_for_the_device_once(
    waits: Waits,
    settings: dict[str, Any],
    optimizer: str,
    counts: dict[tuple[str, str], tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`Flights` raises where a collective's memory is used, written or freed too early."""
    use_meta(monkeypatch)
    monkeypatch.setattr("parallel.plan.buckets.BUCKET_ELEMENTS", 0)
    monkeypatch.setattr("parallel.engine.gathers.num_kept", lambda elements: 1)
    engine = engine_on(settings, optimizer)
    step(engine)  # makes state and, in a pipeline, starts communicators
    waits.lines.clear()
    found = step(engine)
    assert waits.lines == WAITS
    assert found.joined() == [torch.float32] * ("sequence" in settings), "norms' gradients are summed in one message"
    assert found.counts() == counts


@pytest.mark.usefixtures("waits")  # forgets the group
def test_a_race_is_found() -> None:
    """Each of the three ways to use memory that a collective still needs."""
    group = fake_group(0, 2, "data", (0, 1))
    with followed() as flights:
        shard, whole = torch.zeros(2), torch.zeros(4)
        work = dist.reduce_scatter_tensor(shard, whole, group=group, async_op=True)
        assert work is not None
        shard.view(1, 2), whole + 1  # no race: a view, and a second reader
        with pytest.raises(AssertionError, match="uses the result of a reduce-scatter before it is here"):
            shard + 1
        with pytest.raises(AssertionError, match="writes what a reduce-scatter still reads"):
            whole[:1].zero_()
        del whole
        with pytest.raises(AssertionError, match="memory of a reduce-scatter is free before it has ended"):
            work.wait()
        dist.all_reduce(shard, group=group)
    assert [flight.kind for flight in flights.flying] == ["reduce-scatter"]
    assert [flight.kind for flight in flights.in_the_way] == ["all-reduce"]
