"""While training: the loss on the validation split, and answers to look at."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from common.progress import beat
from data.config import ComponentConfig, Mixture, shares
from data.objectives import NAMES
from data.tokenizer import Tokenizer
from evaluation.sample_sheet import Sample
from model.loss import LossTotals
from parallel.engine.base import Engine
from parallel.layout import Layout
from train.config import EvaluationConfig, RunConfig
from train.run.metrics_file import Line
from train.step.batch import Share, joiner, read_or_stop, trimmer
from train.step.metrics import losses
from train.step.predict import answers
from train.step.reader import ReplicaReader
from train.step.reduction import Agreement, gather_to_first

SPLIT = "validation"


class Validation:
    """The same examples every time, so that losses of different steps can be compared."""

    def __init__(self, config: RunConfig, layout: Layout, tokenizer: Tokenizer) -> None:
        """`config`: as the phase sees it. Nothing is opened where `evaluation.every_steps` is 0."""
        self.settings, self.layout, self.tokenizer = config.evaluation, layout, tokenizer
        self.last_step, self.components = config.run.steps, list(config.mixture)
        num_examples = config.data.global_batch_size * self.settings.steps
        self.due_examples = [share * num_examples for share in shares(config.mixture).values()]
        self.warnings: list[str] = []  # of the last validation
        self.trim, self.join = trimmer(config), joiner(config, layout.device)
        self.agreement = Agreement(layout.data_parallel_size, layout.device, len(NAMES), len(self.components))
        self.tokens_per_image = config.vit.num_tokens(config.model.image_size)
        if self.settings.every_steps:
            self.reader = ReplicaReader(config, layout, tokenizer, config.mixture, SPLIT, prefetch=0)

    def due(self, step: int) -> bool:
        """Whether to validate after this step."""
        every = self.settings.every_steps
        return every > 0 and (step % every == 0 or step == self.last_step)

    def read(self, step: int) -> Share:
        """This rank's share of a validation step."""
        return Share.of(self.reader.read(step), self.join)

    def losses(self, engine: Engine) -> Line:
        """`validation/loss`, and per objective `validation/loss/<objective>` and `validation/accuracy/<objective>`.

        What has no example has no loss: null, with a warning that names it.
        """
        sums: list[LossTotals] = []
        examples, skipped = [0] * len(self.components), Counter[str]()
        for step in range(1, self.settings.steps + 1):
            beat(f"validation loss, batch {step} of {self.settings.steps}")
            share = read_or_stop(partial(self.read, step), self.agreement)
            agreed = self.agreement.agree(share.facts(self.tokens_per_image, self.components))
            examples = [before + new for before, new in zip(examples, agreed.components, strict=True)]
            skipped.update(agreed.skipped)
            sums.append(engine.evaluate(share.filled(agreed.num_micro_batches)))
        self.warnings = self.without_examples(examples, skipped)
        parts = ([totals.nll, totals.z_loss, totals.correct, totals.tokens] for totals in sums)
        return losses(LossTotals(*(sum(each[1:], each[0]) for each in zip(*parts, strict=True))), NAMES, "validation/")

    def without_examples(self, examples: Sequence[int], skipped: Counter[str]) -> list[str]:
        """A sentence that names the components without any example, though two or more were due; or none.

        `skipped`: records by "<source>/<cause>".
        """
        due = zip(self.components, self.due_examples, examples, strict=True)
        missing = [name for name, asked, found in due if asked >= 2 and not found]
        if not missing and any(examples):
            return []
        what = f"example of {', '.join(missing)}" if any(examples) else f"example (of {', '.join(self.components)})"
        causes = "".join(f" ({count:,} x {cause})" for cause, count in skipped.most_common(1))
        return [
            f"Validation has no {what} in {self.settings.steps} batches of the {SPLIT} split, so that no loss of it is "
            f"measured{causes}; check what its records hold, or set evaluation.every_steps=0."
        ]

    def samples(self, engine: Engine) -> list[Sample]:
        """Answers to `evaluation.samples` validation examples of all components, on the first rank; others get none."""
        if not self.settings.samples:
            return []
        per_component = math.ceil(self.settings.samples / len(self.components))
        batches = self.reader.held_out(per_component, per_component)
        own = list(answers(engine, batches, self.tokenizer, self.settings.max_new_tokens, self.trim))
        found = gather_to_first(own if self.layout.is_replica_leader else [], self.layout.device)
        shown = sorted(found, key=lambda sample: sample.index)[: self.settings.samples]
        return [replace(sample, image=self.reader.picture(sample.index, per_component)) for sample in shown]


def chosen(mixture: Mixture, settings: EvaluationConfig) -> Mixture:
    """Return the components to evaluate: those that `evaluation.components` names, or all of the mixture, each once.

    A source and objective that the mixture has several times, with other options, is evaluated as often. One that the
    mixture lacks is named "source/objective".
    """
    pairs = [(each.source, each.objective) for each in settings.components or mixture.values()]
    kept: Mixture = {}
    for pair in dict.fromkeys(pairs):
        own = {name: each for name, each in mixture.items() if (each.source, each.objective) == pair}
        for name, each in own.items():
            if each.options not in [kept[before].options for before in own if before in kept]:
                kept[name] = each
        if not own:
            kept["/".join(pair)] = ComponentConfig(*pair, weight=1.0, options={})
    return kept
