"""Validate while training: the loss on the validation split, and predictions to look at."""

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

from common.progress import beat
from data.config import ComponentConfig, Mixture, shares
from data.objectives import NAMES
from data.tokenizer import Tokenizer
from evaluation.config import EvaluationConfig
from evaluation.sample_sheet import Sample
from model.loss import LossTotals
from parallel.engine.base import Engine
from parallel.layout import Layout
from train.config import RunConfig
from train.run.metrics_file import Line
from train.step.metrics import losses
from train.step.predict import predictions
from train.step.reader import ReplicaReader
from train.step.reduction import gather_to_main
from train.step.step_reader import StepReader
from train.step.task_validation import TaskValidation

SPLIT = "validation"


class Validation:
    """Validate on the same examples every time, so that losses of different steps can be compared."""

    def __init__(self, config: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        """Open the validation split, unless `evaluation.every_steps` is 0; `config`: that of the phase."""
        self.run_config, self.config = config, config.evaluation
        self.layout, self.tokenizer = layout, tokenizer
        self.components = list(config.mixture)
        num_examples = config.data.global_batch_size * self.config.steps
        self.due_examples = {name: share * num_examples for name, share in shares(config.mixture).items()}
        self.warnings: list[str] = []  # of the last validation
        self.tasks = TaskValidation(config, layout, tokenizer)
        if self.config.every_steps:
            self.reader = ReplicaReader(config, layout, tokenizer, config.mixture, SPLIT, prefetch=0)
            self.step_reader = StepReader(config, layout, self.reader)

    def due(self, step: int) -> bool:
        """Return whether to validate after this step."""
        every = self.config.every_steps
        return every > 0 and (step % every == 0 or step == self.run_config.run.steps)

    def measure(self, engine: Engine) -> Line:
        """Return the losses, and on the main rank the scores of the phase's tasks; a collective of all ranks."""
        with engine.averaged() if self.config.average else nullcontext():
            return self.losses(engine) | self.tasks.scores(engine)

    def losses(self, engine: Engine) -> Line:
        """Return `validation/loss`, and `validation/loss/<objective>` and `validation/accuracy/<objective>`.

        A loss without any example is null; `warnings` names the component.
        """
        totals: list[LossTotals] = []
        examples, skipped = Counter[str](), Counter[str]()
        for step in range(1, self.config.steps + 1):
            beat(f"validation loss, batch {step} of {self.config.steps}")
            read = self.step_reader.read(step)
            examples.update(read.stats.components)
            skipped.update(read.stats.skipped)
            totals.append(engine.evaluate(self.step_reader.fill(read)))
        self.warnings = self.without_examples(examples, skipped)
        return losses(add(totals), NAMES, "validation/")

    def without_examples(self, examples: Mapping[str, int], skipped: Counter[str]) -> list[str]:
        """Return a sentence that names the components without any example though two or more were due, or none.

        `examples`: by component. `skipped`: records by "<source>/<cause>".
        """
        any_examples = any(examples.values())
        missing = [name for name, expected in self.due_examples.items() if expected >= 2 and not examples[name]]
        if not missing and any_examples:
            return []
        what = f"example of {', '.join(missing)}" if any_examples else f"example (of {', '.join(self.components)})"
        causes = "".join(f" ({count:,} x {cause})" for cause, count in skipped.most_common(1))
        return [
            f"Validation has no {what} in {self.config.steps} batches of the {SPLIT} split, so that no loss of it is "
            f"measured{causes}; check what its records hold, or set evaluation.every_steps=0."
        ]

    def samples(self, engine: Engine) -> list[Sample]:
        """Return predictions for `evaluation.samples` examples of all components, on the main rank; a collective."""
        if not self.config.samples or self.run_config.pali.tower == "vit":
            return []
        per_component = math.ceil(self.config.samples / len(self.components))
        batches = self.reader.held_out(per_component, per_component)
        own = list(predictions(engine, batches, self.tokenizer, self.run_config))
        found = gather_to_main(own if self.layout.is_replica_leader else [], self.layout.device)
        shown = sorted(found, key=lambda sample: sample.index)[: self.config.samples]
        return [replace(sample, image=self.reader.image(sample.index, per_component)) for sample in shown]


def add(totals: list[LossTotals]) -> LossTotals:
    """Add the totals of several batches."""
    parts = ([each.nll, each.z_loss, each.correct, each.tokens] for each in totals)
    return LossTotals(*(sum(part[1:], part[0]) for part in zip(*parts, strict=True)))


def chosen(mixture: Mixture, config: EvaluationConfig) -> Mixture:
    """Return a mixture of the components to evaluate, each once: `evaluation.components`, or all of the mixture.

    A source and objective that the mixture has several times, with other options, is evaluated as often. One that the
    mixture lacks is named "source/objective".
    """
    pairs = [(each.source, each.objective) for each in config.components or mixture.values()]
    kept: Mixture = {}
    for pair in dict.fromkeys(pairs):
        own = {name: each for name, each in mixture.items() if (each.source, each.objective) == pair}
        for name, each in own.items():
            if each.options not in [kept[before].options for before in own if before in kept]:
                kept[name] = each
        if not own:
            kept["/".join(pair)] = ComponentConfig(*pair, weight=1.0, options={})
    return kept
