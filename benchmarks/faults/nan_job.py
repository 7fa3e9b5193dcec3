"""Run `train.pretrain`, with a NaN in rank 1's gradient whenever one batch is trained on.

FAULT_NAN_BATCH=6 torchrun --nproc_per_node 2 -m benchmarks.faults.nan_job experiment=equivalence …
"""

import math
import os
from typing import Any

from model.loss import LossTotals
from parallel.engine.base import Engine
from train import pretrain
from train.entry import entry
from train.step.loop import Loop

batch = 0


def inject_nan() -> None:
    """Wrap the reading of a batch and the sum of the gradients."""
    wanted, read, measure = int(os.environ["FAULT_NAN_BATCH"]), Loop.read, Engine.measure

    def reading(loop: Loop, step: int) -> Any:
        global batch
        batch = loop.run.skipped_batches.batch_number(step)
        return read(loop, step)

    def measuring(engine: Engine, totals: LossTotals) -> Any:
        if batch == wanted and engine.layout.rank == 1:
            next(p for p in engine.model.parameters() if p.grad is not None).grad.fill_(math.nan)  # type: ignore
        return measure(engine, totals)

    Loop.read, Engine.measure = reading, measuring  # type: ignore


if __name__ == "__main__":
    inject_nan()
    entry("pretrain", pretrain.main)
