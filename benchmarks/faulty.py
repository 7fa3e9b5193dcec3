"""`train.pretrain` with a gradient that turns to NaN on one rank, every time a certain batch is learned from.

FAULT_NAN_BATCH=6 torchrun --nproc_per_node 2 -m benchmarks.faulty experiment=equivalence …
"""

import math
import os
from typing import Any

from parallel.engine.base import Engine
from train import pretrain
from train.entry import entry
from train.step.batch import Share
from train.step.loop import Loop

batch = 0


def poisoned() -> None:
    """Wrap what reads a batch and what updates the weights."""
    wanted, read, update = int(os.environ["FAULT_NAN_BATCH"]), Loop.read, Engine.update

    def reading(loop: Loop, step: int) -> Share:
        global batch
        batch = loop.run.left_out.batch_of(step)
        return read(loop, step)

    def updating(engine: Engine, rate: float) -> Any:
        if batch == wanted and engine.layout.rank == 1 and not engine.optimizer.skip:
            next(p for p in engine.model.parameters() if p.grad is not None).grad.fill_(math.nan)  # type: ignore
        return update(engine, rate)

    Loop.read, Engine.update = reading, updating  # type: ignore


if __name__ == "__main__":
    poisoned()
    entry("pretrain", pretrain.main)
