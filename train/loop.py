"""The loop: read, forward and backward, judge, update, measure, save. It knows nothing of how the model is divided."""

import math
import time

from data.objectives import NAMES
from data.stream import Reader
from model.loss import LossTotals
from parallel.engine import Engine
from train.agreement import Agreed, agree, gather
from train.config import RunConfig
from train.entry import Interrupted
from train.flops import FlopCounter, peak_tflops
from train.guard import Guard, save_bad_batch, stopped
from train.metrics import memory_bytes, step_line
from train.phases import Span
from train.run import Extra, Run
from train.schedule import learning_rate
from train.steps import Share, identities, seed_generators, trimmer
from train.validation import Validation
from train.watchdog import Watchdog


class Loop:
    """The steps of one phase."""

    def __init__(
        self,
        config: RunConfig,
        span: Span,
        run: Run,
        engine: Engine,
        reader: Reader,
        validation: Validation,
        extra: Extra,
    ) -> None:
        """`config`: as this phase sees it (`phases.for_phase`); `extra`: what the restored checkpoint held."""
        self.config, self.span, self.run, self.engine = config, span, run, engine
        self.reader, self.validation, self.layout = reader, validation, run.layout
        same_phase = extra.get("phase") == span.phase.name
        self.guard = Guard(config.run.guard, extra["guard"] if same_phase else ())
        self.tokens_per_image = config.vit.num_tokens(config.model.image_size)
        self.trim = trimmer(config)
        self.flops = FlopCounter(config, span.phase.freeze)
        self.peak_tflops = peak_tflops(config, self.layout.device)
        self.watchdog = Watchdog(config.parallel.timeout_s)
        self.held: dict[int, Share] = {}  # the dry run's share, which the first step reads again

    def train(self, done: int) -> int:
        """All steps of the phase after step `done`; returns the last one. Raises Interrupted and RunStopped."""
        with self.watchdog:
            self.dry_run(done + 1)
            for step in range(done + 1, self.span.last + 1):
                self.watchdog.beat(f"step {step - 1}")
                agreed = self.step(step)
                every = self.config.checkpoint.every_steps
                if agreed.save or agreed.stop or step % every == 0 or step == self.span.last:
                    self.watchdog.beat(f"step {step}, in its checkpoint")
                    self.run.save(self.engine, step, {"guard": self.guard.state, "phase": self.span.phase.name})
                if agreed.stop and step < self.config.run.steps:
                    self.run.settle()
                    raise Interrupted(
                        f"Interrupted after step {step}; it is saved, and the same command goes on from there."
                    )
        return self.span.last

    def dry_run(self, step: int) -> None:
        """Forward and backward on the first batch, and forget it: what cannot work fails before the first step."""
        share, agreed, _ = self.agreed_share(step)
        self.engine.forward_backward(share.micro_batches(agreed.num_micro_batches, self.trim), agreed.num_targets)
        self.engine.discard()
        self.held = {step: share}

    def step(self, step: int) -> Agreed:
        """One step of all ranks, from data to the line of metrics."""
        began = time.perf_counter()
        seed_generators(self.config.run.seed, step, self.layout.data_parallel_rank)
        share, agreed, positions = self.agreed_share(step)
        micro_batches = share.micro_batches(agreed.num_micro_batches, self.trim)
        totals = self.engine.forward_backward(micro_batches, agreed.num_targets)
        rate = learning_rate(self.config.schedule, step, self.config.run.steps) * self.span.phase.learning_rate_factor
        cause, grad_norm = self.update(totals, rate)
        line = step_line(
            step, totals, agreed, NAMES, grad_norm=grad_norm, lr=rate, seconds=time.perf_counter() - began,
            positions=positions, world_size=self.layout.world_size, peak_tflops=self.peak_tflops,
            flops=self.flops.step(sum(agreed.examples), agreed.images, agreed.encoder_tokens, agreed.num_targets),
        )  # fmt: skip
        if self.validation.due(step):
            self.watchdog.beat(f"the update of step {step}, in validation")
            line |= self.validation.losses(self.engine)
        self.run.record(line if cause is None else line | {"guard": cause})
        if self.validation.due(step):
            self.watchdog.beat(f"the validation loss of step {step}, in generation")
            self.run.show(step, self.validation.samples(self.engine))
        if cause is not None:
            self.refuse(step, cause, share)
        return agreed

    def update(self, totals: LossTotals, rate: float) -> tuple[str | None, float | None]:
        """Take the step, unless the loss or the gradient is not to be trusted: (why not, norm of the gradient)."""
        loss = totals.loss.item()
        cause = self.guard.verdict(loss)
        if cause is not None:
            self.engine.discard()
            return cause, None
        norm = self.engine.update(rate)
        if not math.isfinite(norm):
            return "gradient is not finite", None
        self.guard.accept(loss)
        return None, norm

    def refuse(self, step: int, cause: str, share: Share) -> None:
        """Keep the ids of a skipped step's examples; stop the run if there were too many in a row."""
        examples = gather(identities(share.infos) if self.layout.speaks else [])
        if self.run.first_rank:
            path = save_bad_batch(self.run.folder, step, cause, examples)
            self.run.display.note(f"Step {step} is skipped: the {cause}; its examples are in {path}.")
        if self.guard.refuse():
            raise stopped(step, self.guard.bad_in_a_row, cause, self.run.folder)

    def read(self, step: int) -> Share:
        """This rank's share; step 1 is the first of the mixture."""
        if step in self.held:
            return self.held.pop(step)
        rows, infos, statistics = self.reader.read(step - 1)
        return Share(rows, infos, statistics.skipped)

    def agreed_share(self, step: int) -> tuple[Share, Agreed, int]:
        """This rank's share, what all ranks agree on, and the positions of all rows of the step."""
        began = time.perf_counter()
        share = self.read(step)
        waited = time.perf_counter() - began
        local = share.facts(self.tokens_per_image)
        local.data_wait_s = waited
        local.memory_bytes = memory_bytes(self.layout.device)
        local.stop, local.save = self.run.interrupt.asked, self.run.save_due()
        agreed = agree(local, self.layout.data_parallel_size, self.layout.device)
        return share, agreed, share.positions * agreed.num_micro_batches * self.layout.data_parallel_size
