"""Record the actions that torch.distributed.pipelining takes on each rank: post messages, wait for them, compute.

The schedule's own code runs, with stages that record instead of computing and sending. So the list is that of the
installed torch, whatever it is, and needs no process group.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch.distributed.pipelining.schedules as torch_schedules
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

FORWARD, BACKWARD = "forward", "backward"


class Message(NamedTuple):
    """A message: activations that stage `stage` receives (forward), or gradients that it receives (backward)."""

    kind: str
    stage: int
    micro_batch: int


class Action(NamedTuple):
    """One thing that a rank does, in order.

    `do`: "compute" runs one pass of one micro-batch, named by `messages[0]`; "post" starts messages that this rank
    sends or receives; "wait" waits until they have arrived.
    """

    do: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pipeline:
    """The size of a schedule: ranks, stages of each, micro-batches, and the name of `parallel.schedule`."""

    ranks: int
    virtual_stages: int
    micro_batches: int
    schedule: str

    @property
    def stages(self) -> int:
        """Return the stages of the whole pipeline."""
        return self.ranks * self.virtual_stages

    @property
    def run_micro_batches(self) -> int:
        """Return the micro-batches that run: the interleaved schedule takes multiples of the ranks."""
        multiple = self.ranks if self.virtual_stages > 1 else 1
        return -(-self.micro_batches // multiple) * multiple


@lru_cache(maxsize=256)
def actions(pipeline: Pipeline) -> tuple[tuple[Action, ...], ...]:
    """Return the actions of every rank of the schedule that `parallel.pipeline.schedule.Pipeline` would choose."""
    kind: Any = _kind(pipeline)
    stages = [_Stage(pipeline, index) for index in range(pipeline.stages)]
    interleaved, number = pipeline.virtual_stages > 1, pipeline.run_micro_batches
    schedule: Any = None
    found = []
    for rank in range(pipeline.ranks):
        own = stages[rank :: pipeline.ranks]
        if schedule is None or not interleaved:
            schedule = kind(own if interleaved else own[0], number, loss_fn=None, scale_grads=False)
        schedule.rank, schedule._stages = rank, own  # an interleaved schedule has the lists of all ranks
        found.append(tuple(_record(schedule, own, number)))
    return tuple(found)


def _record(schedule: Any, stages: Sequence["_Stage"], number: int) -> list[Action]:
    recorded: list[Action] = []
    for stage in stages:
        stage.recorded = recorded
    schedule._initialize_stage = schedule._initialize_stages = lambda *_, **__: None  # they exchange shapes
    run = _with_globals(
        type(schedule)._step_microbatches,
        _batch_p2p=lambda ops, desc=None: _post(recorded, ops),
        _wait_batch_p2p=lambda work: _add(recorded, "wait", work),
        _sorted_batch_p2p=lambda ops, desc=None: {0: _post(recorded, ops)} if ops else {},
        record_function=lambda _: nullcontext(),
        _get_profiler_function_name=lambda _: "",
    )
    run(schedule, [()] * number, [{}] * number, None, None, False)
    return recorded


def _kind(pipeline: Pipeline) -> type:
    if pipeline.virtual_stages > 1:
        return ScheduleInterleaved1F1B
    few = pipeline.micro_batches < pipeline.stages
    return ScheduleGPipe if few or pipeline.schedule == "gpipe" else Schedule1F1B


def _with_globals(function: Any, **changed: Any) -> Any:
    """Return a copy of a function that finds other global names; the module itself stays as it is."""
    names = {**vars(torch_schedules), **changed}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def _post(recorded: list[Action], ops: Sequence[Message]) -> list[Message]:
    return _add(recorded, "post", ops)


def _add(recorded: list[Action], do: str, messages: Sequence[Message]) -> list[Message]:
    if messages:
        recorded.append(Action(do, tuple(messages)))
    return list(messages)


class _Stage:
    """A stage as a schedule of torch 2.13 uses it; it records."""

    def __init__(self, pipeline: Pipeline, index: int) -> None:
        self.recorded: list[Action] = []
        self.stage_index, self.num_stages = index, pipeline.stages
        self.group_size, self.group_rank, self.group, self.submod = pipeline.ranks, index % pipeline.ranks, None, None
        self.is_first, self.is_last = index == 0, index == pipeline.stages - 1
        self.has_backward = True

    def get_fwd_recv_ops(self, micro_batch: int) -> list[Message]:
        """Return the message with the stage's inputs."""
        return [] if self.is_first else [Message(FORWARD, self.stage_index, micro_batch)]

    def get_fwd_send_ops(self, micro_batch: int) -> list[Message]:
        """Return the message with the stage's outputs."""
        return [] if self.is_last else [Message(FORWARD, self.stage_index + 1, micro_batch)]

    def get_bwd_recv_ops(self, micro_batch: int) -> list[Message]:
        """Return the message with the gradients of the stage's outputs."""
        return [] if self.is_last else [Message(BACKWARD, self.stage_index, micro_batch)]

    def get_bwd_send_ops(self, micro_batch: int) -> list[Message]:
        """Return the message with the gradients of the stage's inputs."""
        return [] if self.is_first else [Message(BACKWARD, self.stage_index - 1, micro_batch)]

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> tuple[()]:
        """Record a forward pass."""
        self.recorded.append(Action("compute", (Message(FORWARD, self.stage_index, micro_batch),)))
        return ()

    def backward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        """Record a backward pass."""
        self.recorded.append(Action("compute", (Message(BACKWARD, self.stage_index, micro_batch),)))

    def clear_runtime_states(self) -> None:
        """Do nothing: nothing is kept."""

    def perform_reduce_grad(self, _: int) -> None:
        """Do nothing: the engine reduces gradients."""
