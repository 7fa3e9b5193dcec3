"""The loop: read, forward and backward, judge, update, measure, save. It knows nothing of how the model is divided."""

import math
import time
from contextlib import closing
from dataclasses import replace
from functools import partial

from common.errors import Interrupted
from common.progress import beat
from data.objectives import NAMES
from model.loss import LossTotals
from parallel.communication_time import CommunicationWait
from parallel.engine.base import Engine
from train.config import RunConfig
from train.health.memory import memory_bytes
from train.health.profiling import Profiler, memory_told
from train.health.stragglers import RankTimes, Stragglers
from train.phases import Span
from train.run.metrics_file import Line
from train.run.run import Extra, Run
from train.run.skipped_batches import NAME
from train.schedule import learning_rate
from train.step.batch import Share, identities, joiner, read_or_stop, seed_generators
from train.step.flops import FlopCounter, peak_tflops
from train.step.metrics import step_line
from train.step.reader import ReplicaReader
from train.step.reduction import Agreed, Agreement, gather_to_first
from train.step.shares import Shares
from train.step.spike_guard import Guard, save_bad_batch, stopped
from train.step.validation import Validation

NOTHING = "no target token"  # why a step is passed over: it is no bad step, and there is nothing to learn from


class Loop:
    """The steps of one phase."""

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
        """`config`: as this phase sees it (`phases.for_phase`); `extra`: what the restored checkpoint held."""
        self.config, self.span, self.run, self.engine = config, span, run, engine
        self.reader, self.validation, self.layout = reader, validation, run.layout
        same_phase = extra.get("phase") == span.name
        self.guard = Guard(config.run.guard, extra["guard"] if same_phase else (), extra.get("bad", ()))
        self.tokens_per_image = config.vit.num_tokens(config.model.image_size)
        self.join = joiner(config, self.layout.device)
        self.flops = FlopCounter(engine.blueprint.plan, config.pali.tokens_per_image)
        self.peak_tflops = peak_tflops(config, self.layout.device)
        self.waiting = CommunicationWait(self.layout.device)
        self.shares = Shares(config.mixture, span.name, extra.get("shares") if same_phase else None)
        self.empty_steps = int(extra.get("empty_steps", 0)) if same_phase else 0  # of the phase
        self.agreement = Agreement(
            self.layout.data_parallel_size, self.layout.device, len(NAMES), len(self.shares.names)
        )
        self.stragglers = Stragglers(config.run.straggler)
        self.profiler = Profiler(config.profile, run.folder, self.layout.rank, self.layout.device)
        self.times: RankTimes | None = None  # of the step before
        self.held: dict[int, Share] = {}  # the dry run's share, which the first step reads again

    def train(self, done: int) -> int:
        """All steps of the phase after step `done`; returns the last one, or an earlier one if the run must go on from
        an older checkpoint. Raises Interrupted and RunStopped.
        """
        memory = memory_told(self.config.profile, self.run.folder, self.layout.rank, self.layout.device)
        with self.waiting, memory, closing(self.profiler):
            self.announce()
            self.dry_run(done + 1)
            due = False
            for step in range(done + 1, self.span.last + 1):
                self.profiler.begin(step)
                agreed = self.step(step)
                if (told := self.profiler.end(step)) is not None:
                    self.run.display.note(told)
                if self.guard.gives_up:
                    return self.roll_back(step)
                due = due or agreed.save or step % self.config.checkpoint.every_steps == 0
                if agreed.stop or step == self.span.last or (due and not self.guard.bad):
                    self.save(step)
                    due = bool(self.guard.bad)
                if agreed.stop and step < self.config.run.steps:
                    self.run.settle()
                    raise Interrupted(
                        f"Interrupted after step {step}; it is saved, and the same command goes on from there."
                    )
        if self.guard.bad and self.span.last == self.config.run.steps:
            self.run.display.note(
                f"The weights are those of step {self.span.last - len(self.guard.bad)}: all after it were skipped."
            )
        return self.span.last

    def save(self, step: int) -> None:
        """Begin the checkpoint of a step.

        Within a row of skipped steps the weights are those before it, but whether to go back is open. So a checkpoint
        that cannot wait, at a signal or at the end of the phase, holds the row, which the next process counts on; it
        replaces no other one.
        """
        beat(f"step {step}, its checkpoint")
        state = {"guard": self.guard.state, "phase": self.span.name} | self.counted
        self.run.save(self.engine, step, state | ({"bad": list(self.guard.bad)} if self.guard.bad else {}))

    def announce(self) -> None:
        """Report components of the mixture that the phase will not see."""
        if self.shares.names:
            steps = self.span.last - self.span.first + 1
            rare = self.shares.too_rare(steps, self.config.data.global_batch_size)
            if rare is not None:
                self.run.alert("shares", rare)

    def dry_run(self, step: int) -> None:
        """Forward and backward on the first batch, and forget it: what cannot work fails before the first step."""
        share, agreed = self.agreed_share(step)
        self.engine.forward_backward(share.filled(agreed.num_micro_batches), agreed.num_targets)
        self.engine.discard()
        self.held = {step: replace(share, data_wait_s=0.0)}

    @property
    def counted(self) -> Extra:
        """What a checkpoint must hold for a resumed run to count on."""
        shares: Extra = {"shares": self.shares.state} if self.shares.names else {}
        return shares | ({"empty_steps": self.empty_steps} if self.empty_steps else {})

    def step(self, step: int) -> Agreed:
        """One step of all ranks, from data to the line of metrics."""
        began = time.perf_counter()
        self.waiting.seconds()  # what came before is not this step's
        seed_generators(self.config.run.seed, step, self.layout.data_parallel_rank)
        share, agreed = self.agreed_share(step)
        beat(f"step {step}, forward and backward")
        totals = self.engine.forward_backward(share.filled(agreed.num_micro_batches), agreed.num_targets)
        rate = learning_rate(self.config.schedule, step, self.config.run.steps) * self.span.phase.learning_rate_factor
        beat(f"step {step}, update")
        cause, grad_norm = self.update(totals, rate)
        self.times = RankTimes(time.perf_counter() - began, self.waiting.seconds(), share.data_wait_s)
        line = step_line(
            step, totals, agreed, NAMES, grad_norm=grad_norm, lr=rate, seconds=self.times.step_s,
            world_size=self.layout.world_size, peak_tflops=self.peak_tflops,
            flops=self.flops.step(sum(agreed.examples), agreed.images, agreed.encoder_tokens, agreed.num_targets),
        )  # fmt: skip
        line |= self.count(agreed, cause)
        if self.validation.due(step):
            line |= self.validation.losses(self.engine)
        self.run.record(line)
        if self.validation.due(step):
            self.run.show(step, self.validation.samples(self.engine))
            for warning in self.validation.warnings:
                self.run.alert("validation", warning)
        if (parted := self.shares.warning()) is not None:
            self.run.alert("shares", parted)
        if (slow := self.stragglers.judge(agreed.times)) is not None:
            self.run.alert("straggler", slow)
        if cause == NOTHING:
            self.pass_over(step)
        elif cause is not None:
            self.refuse(step, cause, share)
        return agreed

    def count(self, agreed: Agreed, cause: str | None) -> Line:
        """Count the step's examples, and the step if it has none: what is to be said of it in the metrics."""
        if self.shares.names:
            self.shares.add(agreed.components, self.config.data.global_batch_size)
        line = self.shares.metrics() | ({} if cause is None else {"guard": cause})
        if cause != NOTHING:
            return line
        self.empty_steps += 1
        return line | {"empty_steps": self.empty_steps}

    def update(self, totals: LossTotals, rate: float) -> tuple[str | None, float | None]:
        """Take the step, unless the loss or the gradient is not to be trusted: (why not, norm of the gradient)."""
        if not totals.tokens.any():  # its loss would be 0, and an update would decay moments and weights
            self.engine.discard()
            return NOTHING, None
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

    def pass_over(self, step: int) -> None:
        """Report a step without any target: the first one, and each tenfold of them."""
        if self.empty_steps == 10 ** (len(str(self.empty_steps)) - 1):
            self.run.alert(
                "empty step",
                f"Step {step} changes nothing: it has {NOTHING} (steps like it in phase {self.span.name!r}: "
                f"{self.empty_steps:,}); skipped/… in metrics.jsonl counts what was left out of it.",
            )

    def refuse(self, step: int, cause: str, share: Share) -> None:
        """Keep the ids of a skipped step's examples; stop the run if there were too many in a row."""
        own = identities(share.infos) if self.layout.is_replica_leader else []
        examples = gather_to_first(own, self.layout.device)
        if self.run.is_main_rank:
            path = save_bad_batch(self.run.folder, step, cause, examples)
            self.run.alert("skipped step", f"Step {step} is skipped: the {cause}; its examples are in {path}.")
        self.guard.refuse(self.run.left_out.batch_of(step))
        if self.guard.gives_up and self.run.left_out.roll_backs >= self.config.run.guard.roll_back:
            raise stopped(step, len(self.guard.bad), cause, self.run.folder)

    def roll_back(self, step: int) -> int:
        """Go back to before the bad steps that ended with `step`; returns the step to go on after.

        Where the update before them made weights that are not finite, its batch is left out too: learned from again, it
        would make the same.
        """
        bad = self.guard.bad
        trusted, why = step - len(bad), f"{len(bad)} steps in a row were skipped"
        beat(f"step {step}, going back")
        if trusted and (name := self.run.not_finite(self.engine)) is not None:
            why += f", after step {trusted} had made {name} not finite"
            bad, trusted = [self.run.left_out.batch_of(trusted), *bad], trusted - 1
        good = self.run.roll_back(trusted, bad)
        self.run.alert(
            "roll-back",
            f"The run goes back from step {step} to step {good}: {why}; their batches are left out from now on "
            f"(batches {bad[0]} to {bad[-1]}; {self.run.folder}/{NAME}).",
        )
        return good

    def read(self, step: int) -> Share:
        """This rank's share; step 1 is the first of the mixture."""
        if step in self.held:
            return self.held.pop(step)
        return Share.of(self.reader.read(self.run.left_out.batch_of(step)), self.join)

    def agreed_share(self, step: int) -> tuple[Share, Agreed]:
        """This rank's share, and what all ranks agree on; raises ReadingStopped on all if it stops one."""
        beat(f"step {step}, reading")
        share = read_or_stop(partial(self.read, step), self.agreement)
        beat(f"step {step}, meeting all ranks")
        local = share.facts(self.tokens_per_image, self.shares.names)
        local.times = self.times
        local.memory_bytes = memory_bytes(self.layout.device)
        local.stop, local.save = self.run.interrupt.asked, self.run.save_due()
        return share, self.agreement.agree(local)
