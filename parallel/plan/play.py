"""Play a pipeline's actions against a clock: when each rank computes, waits, and keeps activations.

A message starts when its sender and its receiver have both posted it, as gloo and NCCL transfer; it takes its own
seconds, during which both may compute. Nothing is approximated by a formula for the bubble.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from parallel.plan.actions import BACKWARD, FORWARD, Action, Message, Pipeline, actions

FIRST_ROUNDS, MORE_ROUNDS = 6, 4  # of a micro-batch for each rank
Moments = list[tuple[str, tuple[int, ...]]]  # (kind and own stage of a pass, micro-batches that each own stage keeps)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage for one micro-batch, and of the messages that it receives."""

    forward_s: float
    backward_s: float
    activations_s: float = 0.0
    """Message with its inputs, from the stage before."""
    gradients_s: float = 0.0
    """Message with the gradients of its outputs, from the stage after."""

    @property
    def total_s(self) -> float:
        """Return the seconds of both passes."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Span:
    """One pass on one rank: start and end in seconds since the first action."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A played schedule: its length, and every pass in the order of each rank."""

    seconds: float
    spans: tuple[Span, ...]

    def busy_s(self, rank: int) -> float:
        """Return the seconds in which a rank computes."""
        return sum(span.end_s - span.start_s for span in self.spans if span.rank == rank)


def play(pipeline: Pipeline, stages: Sequence[StageTime]) -> Timeline:
    """Run all actions of all ranks; `stages` are the times of every stage, first to last.

    Raises RuntimeError if ranks wait for each other forever.
    """
    every = actions(pipeline)
    clocks = [0.0] * pipeline.ranks
    spans: list[Span] = []
    posted: dict[Message, float] = {}  # by the first of its two ranks
    arrived: dict[Message, float] = {}
    waiting = deque(range(pipeline.ranks))
    places, stuck = [0] * pipeline.ranks, 0
    while waiting:
        rank = waiting.popleft()
        before = places[rank]
        places[rank] = _advance(rank, every[rank], before, clocks, spans, posted, arrived, stages)
        stuck = 0 if places[rank] > before else stuck + 1
        if places[rank] < len(every[rank]):
            waiting.append(rank)
        if stuck > pipeline.ranks:
            raise RuntimeError(f"the ranks of {pipeline} wait for each other forever")
    return Timeline(max(clocks), tuple(spans))


def _advance(
    rank: int,
    own: Sequence[Action],
    place: int,
    clocks: list[float],
    spans: list[Span],
    posted: dict[Message, float],
    arrived: dict[Message, float],
    stages: Sequence[StageTime],
) -> int:
    """Run a rank's actions from `place` until it waits for a message that its peer has not posted; return the place."""
    now = clocks[rank]
    while place < len(own):
        do, messages = own[place]
        if do == "compute":
            kind, stage, micro_batch = messages[0]
            end = now + (stages[stage].forward_s if kind == FORWARD else stages[stage].backward_s)
            spans.append(Span(rank, kind, stage, micro_batch, now, end))
            now = end
        elif do == "post":
            for message in messages:
                if message in posted:
                    arrived[message] = max(posted.pop(message), now) + _message_s(message, stages)
                else:
                    posted[message] = now
        elif all(message in arrived for message in messages):
            now = max(now, *(arrived[message] for message in messages))
        else:
            break
        place += 1
    clocks[rank] = now
    return place


def _message_s(message: Message, stages: Sequence[StageTime]) -> float:
    stage = stages[message.stage]
    return stage.activations_s if message.kind == FORWARD else stage.gradients_s


def step_s(pipeline: Pipeline, stages: Sequence[StageTime]) -> float:
    """Return the seconds of all micro-batches.

    Beyond the warm-up every further round, of a micro-batch for each rank, adds the same seconds: within 1 % where
    stages are uneven. So longer schedules are continued from two shorter ones.
    """
    if pipeline.ranks == 1:
        return pipeline.micro_batches * sum(stage.total_s for stage in stages)
    first, more, total = FIRST_ROUNDS * pipeline.ranks, MORE_ROUNDS * pipeline.ranks, pipeline.run_micro_batches
    if total <= first + more:
        return play(pipeline, stages).seconds
    shorter, longer = (
        play(Pipeline(pipeline.ranks, pipeline.virtual_stages, number, pipeline.schedule), stages).seconds
        for number in (first, first + more)
    )
    return shorter + (total - first) / more * (longer - shorter)


def kept_counts(pipeline: Pipeline) -> list[Moments]:
    """Return, for every rank and each of its passes, the kind and the micro-batches that each own stage keeps.

    During a forward pass its own micro-batch counts already; during a backward pass it still counts.
    """
    found = []
    for rank, own in enumerate(actions(pipeline)):
        kept = [0] * pipeline.virtual_stages
        moments: Moments = []
        for do, messages in own:
            if do != "compute":
                continue
            kind, stage, _ = messages[0]
            index = (stage - rank) // pipeline.ranks
            if kind == FORWARD:
                kept[index] += 1
            moments.append((f"{kind} {index}", tuple(kept)))
            if kind == BACKWARD:
                kept[index] -= 1
        found.append(moments)
    return found
