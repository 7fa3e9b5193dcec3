"""Validate a fine-tuning by its tasks' scores: generate on validation items, and score as `train.evaluate` does."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from common.errors import Notice
from data.tasks.config import VALIDATION, TaskConfig
from data.tasks.item import Item
from data.tasks.overlap import trained_on
from data.tasks.source import part_items
from data.tasks.stream import ItemStream
from data.tokenizer import Tokenizer
from evaluation.tasks import task_scores
from parallel.engine.base import Engine
from parallel.layout import Layout
from train.config import RunConfig
from train.run.metrics_file import Line
from train.step.predict import predictions
from train.step.reader import HeldOutReader
from train.step.reduction import gather_to_main


class TaskValidation:
    """Score the tasks of a phase's mixture on the same validation items every time."""

    def __init__(self, config: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        """Read the items of every task that the phase trains on; `config`: that of the phase."""
        self.layout, self.tokenizer = layout, tokenizer
        self.parts: list[tuple[TaskConfig, list[Item], HeldOutReader, RunConfig]] = []
        size, most = config.model.image_size, config.evaluation.task_items
        sources = {component.source for component in config.mixture.values() if most and config.evaluation.every_steps}
        for name, task in config.data.tasks.items():
            if name in sources:
                part = task.for_part(VALIDATION)
                items = spread(part_items(task, VALIDATION), most)
                if layout.rank == 0 and (seen := trained_on(task, VALIDATION, items)):
                    warnings.warn(
                        f"{len(seen):,} of {len(items):,} validation items of {name} are trained on (such as "
                        f"{seen[0]}), so that their score favors long training; name others as task.validation.",
                        Notice,
                        stacklevel=2,
                    )
                stream = ItemStream(part, items, tokenizer, size, config.vit.num_tokens(size))
                own = replace(config, evaluation=replace(config.evaluation, max_new_tokens=part.max_new_tokens))
                self.parts.append((part, items, HeldOutReader(layout, stream), own))

    def scores(self, engine: Engine) -> Line:
        """Return `validation/<task>/<score>` of every task, on the main rank; a collective of all ranks.

        Scores are fractions (CIDEr-D up to 10); an item whose image cannot be read scores as an empty prediction.
        """
        line: Line = {}
        for task, items, reader, config in self.parts:
            batches = reader.held_out(config.evaluation.batch, None)
            own = list(predictions(engine, batches, self.tokenizer, config))
            samples = gather_to_main(own if self.layout.is_replica_leader else [], self.layout.device)
            if self.layout.rank == 0:
                found = task_scores(task, items, {sample.id: sample.prediction for sample in samples})
                line |= {f"{VALIDATION}/{task.name}/{name}": score["score"] for name, score in found.items()}
        return line


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most so many items, evenly spread over all: files are often in an order."""
    if len(items) <= most:
        return list(items)
    return [items[number] for number in np.linspace(0, len(items) - 1, most, dtype=np.int64).tolist()]
