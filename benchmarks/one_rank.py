"""Run one rank of many for real: the program itself, at true size, under torch's fake process group.

    python -m benchmarks.one_rank model=pali_17b world_size=1024 rank=0 parallel=tp4_zero3 parallel.micro_batch_size=1

The fake group answers every collective at once and moves no data. Code, allocations, schedule and the order of
collectives are the real ones; values are zeros. Live tensors are counted operator by operator, on the CPU in 16 bits.
No data and no weights are read: rows are full, as `data` shapes them. Other words are those of `train.plan`.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.pipelining import PipelineStage

from benchmarks.live_tensors import Collective, LiveTensors
from common.command_line import run_command, split_own
from common.errors import ConfigurationError
from common.files import write_text
from common.values import PATH, at_least
from model.batch import MicroBatch
from model.costs import BatchShape
from parallel.distributed import Launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout, check
from train.build import expected_step_shape
from train.config import Phase, RunConfig
from train.phases import for_phase, spans
from train.plan import read_config

GIB = 2**30


@dataclass
class OneRank:
    """The rank to run."""

    world_size: int = 8
    """Ranks of the layout, all but one of them fake."""
    rank: int = 0
    """Number of the rank that runs."""
    phase: int = 0
    """Number of the phase, from 0."""
    micro_batches: int = 0
    """Micro-batches of the rank's step; 0 by default: as many as the global batch gives it."""
    output: str | None = field(default=None, metadata=PATH)
    """JSON file for the numbers. Null by default: none."""
    steps: int = 2
    """Steps; memory is that of the last. 2 by default: in the first, ZeRO-3 only records the order of its gathers."""

    def __post_init__(self) -> None:
        at_least("", 1, world_size=self.world_size, steps=self.steps)
        at_least("", 0, rank=self.rank, phase=self.phase, micro_batches=self.micro_batches)
        if self.rank >= self.world_size:
            raise ConfigurationError(f"rank={self.rank} is not below world_size={self.world_size}; choose another.")


@dataclass
class Measured:
    """Bytes of live tensors after building and at most in each part of a step, and the step's collectives."""

    built: int
    forward_backward: int
    update: int
    seconds: float
    calls: dict[Collective, int] = field(default_factory=dict)
    sent: dict[Collective, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Return the most bytes at once."""
        return max(self.forward_backward, self.update)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values: bytes, seconds, and [kind, ranks, calls, bytes] of each collective."""
        plain = {name: value for name, value in vars(self).items() if name not in ("calls", "sent")}
        sizes = [[key.kind, key.group_size, number, self.sent.get(key, 0)] for key, number in self.calls.items()]
        return plain | {"peak": self.peak, "collectives": sorted(sizes)}


def full_rows(shape: BatchShape, image_size: int) -> MicroBatch:
    """Make rows without padding: each a single segment, with its images in front."""
    rows, length, targets = shape.rows, shape.encoder_tokens, shape.decoder_tokens
    visual = shape.images // rows * shape.vision_tokens
    index = torch.full((rows, length), -1)
    index[:, :visual] = torch.arange(rows * visual).view(rows, visual)
    text = torch.ones(rows, targets, dtype=torch.long)
    return MicroBatch(
        images=torch.zeros(shape.images, image_size, image_size, 3, dtype=torch.uint8),
        encoder_tokens=torch.full((rows, length), 5).masked_fill(index >= 0, 0),
        encoder_segments=torch.ones(rows, length, dtype=torch.long),
        visual_index=index,
        decoder_tokens=text,
        decoder_targets=text,
        decoder_segments=text,
        objectives=torch.zeros_like(text),
    )


def measure(config: RunConfig, phase: Phase, options: OneRank) -> Measured:
    """Build the engine of a phase and take its steps as one rank; `config` is that of the phase."""
    os.environ.setdefault("LOCAL_RANK", "0")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=options.rank, world_size=options.world_size)
    _answer_metadata()
    began = time.perf_counter()
    this = Launch(rank=options.rank, world_size=options.world_size)
    counting = LiveTensors(zero=True)
    with counting:
        layout = Layout.start(config.parallel, this)
        step = expected_step_shape(config, layout.data_parallel_size)
        engine = build_engine(
            config.pali,
            config.optimizer,
            layout,
            precision=config.run.precision,
            freeze=phase.freeze,
            seed=None,
            step=step,
        )
        built = counting.live
        number = options.micro_batches or step.num_micro_batches
        batch = full_rows(step.micro_batch, config.model.image_size)
        targets = number * batch.num_targets * layout.data_parallel_size
        found = [_step(engine, counting, [batch] * number, targets) for _ in range(options.steps)][-1]
    return Measured(built, *found[:2], time.perf_counter() - began, *found[2:])


def _step(engine: Engine, counting: LiveTensors, batches: Sequence[MicroBatch], targets: int) -> tuple[Any, ...]:
    counting.reset_peak()
    engine.forward_backward(batches, targets)
    forward_backward, counting.peak = counting.peak, counting.live
    engine.update(1e-3)
    return forward_backward, counting.peak, dict(counting.calls), dict(counting.sent)


def _answer_metadata() -> None:
    """Let stages take the shapes that `CarryPlan` gives them.

    torch 2.13's stages first agree on that by messages; the fake group would deliver zeros, which mean "not agreed".
    """
    agreed = torch.ones(1, dtype=torch.int32)
    PipelineStage._warmup_forward_vote = lambda *_, **__: agreed  # type: ignore[method-assign]
    PipelineStage._warmup_backward_result = lambda *_, **__: agreed  # type: ignore[method-assign]


def show(console: Console, found: Measured) -> None:
    """Print memory and collectives."""
    console.print(
        f"live tensors: {found.built / GIB:.3f} GiB when built; at most {found.forward_backward / GIB:.3f} GiB in "
        f"forward and backward passes, {found.update / GIB:.3f} GiB in the update ({found.seconds:.0f} s)"
    )
    table = Table(title="collectives of a step, this rank")
    for column in ("kind", "ranks", "calls", "bytes of the whole tensors"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for key in sorted(found.calls, key=lambda key: (key.kind, key.group_size)):
        table.add_row(key.kind, str(key.group_size), str(found.calls[key]), f"{found.sent.get(key, 0):,}")
    console.print(table)


def run(words: Sequence[str]) -> tuple[OneRank, Measured]:
    """Run the rank that the words describe; return its options and what it took."""
    own, rest = split_own(words, OneRank)
    config = read_config(rest)
    laid_out = spans(config)
    if own.phase >= len(laid_out):
        raise ConfigurationError(f"phase={own.phase} does not exist; the run has {len(laid_out)}, counted from 0.")
    span = laid_out[own.phase]
    config = for_phase(config, span)
    check(config.parallel, config.pali, own.world_size)
    return own, measure(config, span.phase, own)


def main(words: Sequence[str]) -> None:
    """Run the rank and print what it took."""
    own, found = run(words)
    show(Console(width=120), found)
    if own.output:
        write_text(Path(own.output), json.dumps(found.to_dict()))


if __name__ == "__main__":
    run_command(main)
