"""Train the steps of one phase: read, forward and backward, judge, update, measure, save.

The loop does not depend on how the model is divided over ranks.
"""

import math
import time
from contextlib import closing
from dataclasses import replace

from common.errors import Interrupted, RunStopped
from common.progress import beat
from model.loss import LossTotals
from parallel.communication_time import CommunicationWait
from parallel.engine.base import Engine
from train.config import RunConfig
from train.health.garbage import survivors_frozen
from train.health.memory import memory_bytes
from train.health.profiling import Profiler, explain_lack_of_memory
from train.health.stragglers import RankTimes, Stragglers
from train.phases import Span, phase_learning_rate
from train.run.metrics_file import Line
from train.run.run import Extra, Run
from train.run.skipped_batches import NAME, save_bad_batch
from train.step.batch import identify, with_dropout
from train.step.flops import FlopCounter, peak_tflops
from train.step.metrics import StepMetrics
from train.step.reader import ReplicaReader
from train.step.reduction import PendingReports, RankReport, StepStats, gather_to_main
from train.step.shares import Shares
from train.step.spike_guard import SkippedSteps
from train.step.step_reader import StepInput, StepReader
from train.step.validation import Validation
from train.weights.saved_checkpoint import scored

NO_TARGET = "no target token"  # why a step changes nothing; it is not a bad step


class Loop:
    """Train the steps of one phase."""

    def __init__(
        self,
        config: RunConfig,
        span: Span,
        run: Run,
        engine: Engine,
        reader: ReplicaReader,
        validation: Validation,
        extra: Extra,
    ) -> None:
        """`config`: that of the phase (`phases.for_phase`); `extra`: what the restored checkpoint held."""
        self.config, self.span, self.run, self.engine = config, span, run, engine
        self.validation, self.layout = validation, run.layout
        of_phase: Extra = extra if extra.get("phase") == span.name else {}
        self.reader = StepReader(config, run.layout, reader)
        self.skipped = SkippedSteps(
            config.run.guard, run.skipped_batches, run.folder, of_phase.get("guard", ()), extra.get("bad", ())
        )
        flops = FlopCounter(engine.blueprint.plan, config.pali.tokens_per_image)
        self.metrics = StepMetrics(flops, run.layout.world_size, peak_tflops(config, run.layout.device))
        self.waiting = CommunicationWait(self.layout.device)
        self.shares = Shares(config.mixture, span.name, of_phase.get("shares"))
        self.empty_steps = int(of_phase.get("empty_steps", 0))
        self.stragglers = Stragglers(config.run.straggler)
        self.profiler = Profiler(config.profile, run.folder, self.layout.rank, self.layout.device)
        self.times: RankTimes | None = None  # of the previous step
        self.measured: Line = {}  # of the last step, with its number
        self.read_before: dict[int, StepInput] = {}  # the dry run's data, by step

    def train(self, done: int) -> int:
        """Train all steps of the phase after step `done`, and return the last step.

        Returns an earlier step if the run must go on from an older checkpoint. Raises Interrupted and RunStopped.
        """
        memory = explain_lack_of_memory(self.config.profile, self.run.folder, self.layout.rank, self.layout.device)
        with self.waiting, memory, closing(self.profiler), survivors_frozen(), self.reader:
            self.warn_of_rare_components()
            self.dry_run(done + 1)
            due = False
            for step in range(done + 1, self.span.last + 1):
                self.profiler.begin(step)
                stats = self.step(step)
                if (note := self.profiler.end(step)) is not None:
                    self.run.records.note(note)
                if (trusted := self.skipped.roll_back_to(step)) is not None:
                    return self.roll_back(step, trusted)
                due = due or stats.save or step % self.config.checkpoint.every_steps == 0
                if stats.stop or step == self.span.last or (due and not self.skipped.row):
                    self.save(step)
                    due = bool(self.skipped.row)
                if stats.stop and step < self.config.run.steps:
                    self.run.checkpoints.settle()
                    raise Interrupted(
                        f"Interrupted after step {step}; it is saved, and the same command goes on from there."
                    )
        if self.skipped.row and self.span.last == self.config.run.steps:
            self.run.records.note(
                f"The weights are those of step {self.span.last - len(self.skipped.row)}: all after it were skipped."
            )
        return self.span.last

    def save(self, step: int) -> None:
        """Begin the checkpoint of a step.

        Within a row of skipped steps, the weights are those before the row, and the run may still have to go back. So a
        checkpoint that cannot wait (at a signal, or at the end of the phase) holds the row, and the next process
        continues to count it. Such a checkpoint replaces no other one. Raises RunStopped where replicas have parted.
        """
        if (parted := self.engine.parted_parameter()) is not None:
            raise RunStopped(
                f"The checkpoint of step {step} is not written, because {parted} differs between data-parallel ranks "
                "(faulty hardware, as a rule); exclude the machine and start again from the checkpoint before."
            )
        beat(f"step {step}, its checkpoint")
        shares: Extra = {"shares": self.shares.state} if self.shares.names else {}
        empty_steps: Extra = {"empty_steps": self.empty_steps} if self.empty_steps else {}
        best = self.config.checkpoint.best
        value = self.measured.get(best) if self.measured.get("step") == step else None
        score: Extra = {} if value is None else {"score": scored(best, value)}
        self.run.save(self.engine, step, {"phase": self.span.name} | self.skipped.state | shares | empty_steps | score)

    def warn_of_rare_components(self) -> None:
        """Report components of the mixture that the phase will not see."""
        if self.shares.names:
            steps = self.span.last - self.span.first + 1
            rare = self.shares.too_rare(steps, self.config.data.global_batch_size)
            if rare is not None:
                self.run.records.alert("shares", rare)

    def dry_run(self, step: int) -> None:
        """Run forward and backward on the first batch and discard the gradients, so that errors come before step 1."""
        read = self.read(step)
        self.forward_backward(step, read)
        self.engine.discard()
        self.read_before = {step: replace(read, data=replace(read.data, data_wait_s=0.0), ranks_wait_s=0.0)}

    def step(self, step: int) -> StepStats:
        """Run one step on all ranks, from its data to its line of metrics."""
        began = time.perf_counter()
        self.waiting.seconds()  # resets the sum -> it counts this step only
        read = self.read(step)
        reports = PendingReports(
            RankReport(
                read.data.data_wait_s, memory_bytes(self.layout.device), self.run.signals.requested,
                self.run.checkpoints.save_due(), self.times,
            ),
            self.layout,
        )  # fmt: skip
        beat(f"step {step}, forward and backward")
        totals = self.forward_backward(step, read)
        rate = phase_learning_rate(self.config, self.span, step)
        beat(f"step {step}, update")
        totals, grad_norm, cause = self.update(totals, rate)
        stats = reports.add_to(read.stats)
        waited_s = self.waiting.seconds() + read.ranks_wait_s
        self.times = RankTimes(time.perf_counter() - began, waited_s, read.data.data_wait_s)
        line = self.metrics.line(
            step, totals, stats, seconds=self.times.step_s, learning_rate=rate, grad_norm=grad_norm
        )
        self.report(step, stats, line | self.count(stats, cause))
        if cause == NO_TARGET:
            self.report_empty_step(step)
        elif cause is not None:
            self.skip(step, cause, read)
        return stats

    def forward_backward(self, step: int, read: StepInput) -> LossTotals:
        """Accumulate the gradients of a step, with its dropout; a collective."""
        batches = self.reader.fill(read)
        if self.config.model.dropout_rate:
            batches = with_dropout(batches, self.config.run.seed, step, self.layout.data_parallel_rank)
        return self.engine.forward_backward(batches, read.stats.num_targets)

    def read(self, step: int) -> StepInput:
        """Return this rank's data of a step, and the statistics of all rows; a collective.

        Raises ReadingStopped on every rank where reading ended on one.
        """
        beat(f"step {step}, reading")
        return self.read_before.pop(step, None) or self.reader.read(self.run.skipped_batches.batch_number(step))

    def update(self, totals: LossTotals, rate: float) -> tuple[LossTotals, float | None, str | None]:
        """Update the weights unless the loss or the gradient is bad.

        Return the totals on the host, the norm of the gradient, and why the step was skipped (then without a norm).
        """
        totals, norm = self.engine.measure(totals)  # waits for the device; nothing else of a step does
        cause = self.verdict(totals, norm)
        if cause is not None:
            self.engine.discard()
            return totals, None, cause
        self.engine.update(rate)
        self.skipped.accept(float(totals.loss))
        return totals, norm, None

    def verdict(self, totals: LossTotals, norm: float) -> str | None:
        """Return why the step must change nothing, None where it can be trusted."""
        if not totals.tokens.sum():  # the loss would be 0, and an update would decay moments and weights
            return NO_TARGET
        cause = self.skipped.guard.verdict(float(totals.loss))
        return "gradient is not finite" if cause is None and not math.isfinite(norm) else cause

    def count(self, stats: StepStats, cause: str | None) -> Line:
        """Count the step's examples, and the step if it has none; return the metrics of both."""
        if self.shares.names:
            self.shares.add(stats.components, self.config.data.global_batch_size)
        line = self.shares.metrics() | ({} if cause is None else {"guard": cause})
        if cause != NO_TARGET:
            return line
        self.empty_steps += 1
        return line | {"empty_steps": self.empty_steps}

    def report(self, step: int, stats: StepStats, line: Line) -> None:
        """Write the step's metrics, validate if that is due, and alert the user of missing examples and slow ranks."""
        validates = self.validation.due(step)
        measured = self.validation.measure(self.engine) if validates else {}
        self.measured = {"step": step, **measured}
        self.run.records.record(line | measured)
        if validates:
            self.run.records.show(step, self.validation.samples(self.engine))
            for warning in self.validation.warnings:
                self.run.records.alert("validation", warning)
        if (parted := self.shares.warning()) is not None:
            self.run.records.alert("shares", parted)
        if (slow := self.stragglers.judge(stats.times)) is not None:
            self.run.records.alert("straggler", slow)

    def report_empty_step(self, step: int) -> None:
        """Alert the user of a step without any target: the 1st, 10th, 100th … of the phase."""
        if self.empty_steps == 10 ** (len(str(self.empty_steps)) - 1):
            self.run.records.alert(
                "empty step",
                f"Step {step} changes nothing: it has {NO_TARGET} (steps like it in phase {self.span.name!r}: "
                f"{self.empty_steps:,}); skipped/… in metrics.jsonl counts what was left out of it.",
            )

    def skip(self, step: int, cause: str, read: StepInput) -> None:
        """Count a skipped step and write the ids of its examples; a collective."""
        self.skipped.skip(step, cause)
        own = identify(read.data.infos) if self.layout.is_replica_leader else []
        examples = gather_to_main(own, self.layout.device)
        if self.run.is_main_rank:
            path = save_bad_batch(self.run.folder, step, cause, examples)
            self.run.records.alert("skipped step", f"Step {step} is skipped: the {cause}; its examples are in {path}.")

    def roll_back(self, step: int, trusted: int) -> int:
        """Go back from `step` to the newest checkpoint of step `trusted` or before; return its step.

        Where the update of step `trusted` made weights that are not finite, its batch is left out too: training on it
        again would make the same weights.
        """
        batches, why = self.skipped.row, f"{len(self.skipped.row)} steps in a row were skipped"
        beat(f"step {step}, going back")
        if trusted and (name := self.run.checkpoints.not_finite(self.engine)) is not None:
            why += f", after step {trusted} had made {name} not finite"
            batches, trusted = [self.run.skipped_batches.batch_number(trusted), *batches], trusted - 1
        good = self.run.roll_back(trusted, batches)
        self.run.records.alert(
            "roll-back",
            f"The run goes back from step {step} to step {good}: {why}; their batches are left out from now on "
            f"(batches {batches[0]} to {batches[-1]}; {self.run.folder}/{NAME}).",
        )
        return good
