"""What a run leaves behind and how it speaks: its folder, checkpoints, metrics, tracker and display."""

import socket
import time
from pathlib import Path
from typing import Any, NoReturn

from common.errors import ConfigurationError, Interrupted, RunStopped, StorageFailed
from common.git import git_state
from data.tokenizer import checksum
from evaluation.sample_sheet import Sample, draw
from model.finite import first_not_finite
from model.layers import parameter_parts
from parallel.checkpoint.checkpointer import Checkpointer, NotFinite, SaveFailed, SaveStalled
from parallel.checkpoint.initial_weights import load_files
from parallel.engine.base import Engine
from parallel.layout import Layout
from parallel.plan.cut import table
from train.config import RunConfig, to_dict, to_yaml
from train.facts import Facts
from train.first_weights import first_files
from train.health.signals import Interrupt
from train.run.display import as_text, open_display
from train.run.kept_files import replace_text
from train.run.lock import FolderLock, of_this_job
from train.run.metrics_file import Line, MetricsFile
from train.run.provenance import degrees, hardware, stage_rows
from train.run.resume import check_sources, note, note_sources
from train.run.skipped_batches import SkippedBatches
from train.run.tracking import Tracker, open_tracker
from train.saved_run import convert

Extra = dict[str, Any]


class Run:
    """`config.yaml`, `metrics.jsonl`, `checkpoints/`, `samples/`, `wandb/` in a folder; the first rank writes."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.tokenizer = checksum(config.data.tokenizer)  # of the file as it is now, whatever becomes of it
        self.folder = Path(config.run.folder)
        self.is_main_rank = layout.rank == 0
        self.lock = FolderLock(self.folder, config.parallel.timeout_s / 2)  # the other ranks wait too
        if (holder := layout.broadcast_from_main(self._take_folder)) is not None:
            if of_this_job() and holder.endswith(of_this_job()):  # a node that Slurm lost may live a little longer
                raise Interrupted(f"{self.folder} is still in use by {holder}, which this is; it must start again.")
            raise ConfigurationError(
                f"{self.folder} is in use by {holder}; wait for it or end it, or choose another run.name."
            )
        layout.barrier()
        keep = config.checkpoint
        self.checkpointer = Checkpointer.from_run(self.folder, keep.keep_last, keep.keep_every)
        self.display = open_display(config.run.name, config.run.steps, layout.rank)
        self.interrupt = Interrupt()
        self.tracker = Tracker()
        self.metrics: MetricsFile | None = None
        self.sources: Facts = {}
        self.saved_at = time.monotonic()
        self.skipped_batches: SkippedBatches = layout.broadcast_from_main(
            lambda: SkippedBatches.from_folder(self.folder)
        )
        self.hosts: list[str] = layout.gather_objects([socket.gethostname()])

    def _take_folder(self) -> str | None:
        """Make the folder and lock it; returns who else holds it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.lock.take()
        except FileNotFoundError as error:  # /proc, say, has no room for folders
            raise ConfigurationError(f"{self.folder} cannot be made; choose another run.folder.") from error
        except KeyboardInterrupt as error:
            raise Interrupted(f"Interrupted while waiting for {self.folder}; nothing was begun.") from error

    def restore(self, engine: Engine) -> tuple[int, Extra]:
        """Load the newest checkpoint, else the first weights that are given: (steps done, what was saved with them)."""
        self.settle()
        found = self.checkpointer.load_latest(engine)
        initial = self.config.run.initial
        if found is None and initial is not None:
            checkpoints = Checkpointer.from_run(initial)
            if checkpoints.load_latest(engine, weights_only=True) is None:
                raise ConfigurationError(f"run.initial={initial} has no checkpoint; train it first.")
        if found is None and (files := first_files(self.config)):
            load_files(engine, files)
        self._check_finite(engine, found[0] if found else None)
        return found or (0, {})

    def _check_finite(self, engine: Engine, step: int | None) -> None:
        """Raise ConfigurationError on every rank where a weight that training would begin with is none."""
        settings, name = self.config.run, self.not_finite(engine)
        if name is None:
            return
        if step is None:
            files = ", ".join(filter(None, [settings.initial, *first_files(self.config)]))
            given = files or f"run.seed={settings.seed}"
            raise ConfigurationError(f"{name} is not finite in the first weights ({given}); give others.")
        raise ConfigurationError(
            f"{name} is not finite in the checkpoint of step {step} in {self.checkpointer.folder}; remove that "
            "checkpoint to go on from the one before, or choose another run.name."
        )

    def not_finite(self, engine: Engine) -> str | None:
        """Return the name of a weight that is not finite on any rank, None where all are; a collective."""
        own = first_not_finite((rectangle.name, values) for rectangle, values in engine.held_weights())
        return next(filter(None, self.layout.gather_objects([own])), None)

    def restores(self) -> bool:
        """Whether `restore` will load every weight (or raise); a collective of all ranks."""
        return self.config.run.initial is not None or self.layout.broadcast_from_main(
            lambda: bool(self.checkpointer.steps())
        )

    def take_sources(self, facts: Facts, extra: Extra) -> None:
        """Keep what the sources of a phase hold, for the next checkpoint to be compared with.

        Raises ConfigurationError on every rank where the restored checkpoint (`extra`) was trained on other records.
        """
        saved = extra.get("sources", {})
        check_sources(saved, facts, self.config)
        self.sources = saved | facts

    def begin(self, step: int, extra: Extra, engine: Engine) -> None:
        """Where `step` steps are done: open metrics and tracker, or let the open ones forget what came after."""
        if self.metrics is not None:
            self.metrics.forget_after(step)
        elif self.is_main_rank:
            replace_text(self.folder / "config.yaml", to_yaml(self.config))
            had_metrics = (self.folder / "metrics.jsonl").exists()
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", step)
            if step and not had_metrics:
                self.display.note(
                    f"{self.folder}/metrics.jsonl is not there any more; a new one begins after step {step}."
                )
            self.tracker = open_tracker(
                self.config, self.folder, extra.get("tracker_run"), self.layout.rank, self.facts()
            )
            if step:
                self.alert("restart", f"{self.folder}: resumed after step {step}")
                noted = (
                    note(convert(extra.get("config") or {}), self.config, step),
                    note_sources(extra.get("sources"), self.sources, step),
                )
                for changed in filter(None, noted):
                    self.display.note(changed)
            else:
                self.display.note(f"{self.folder}: a new run")
        if self.metrics is not None and self.metrics.kept is not None:
            self.display.note(
                f"{self.folder} holds no checkpoint, so it begins anew; the metrics until now are kept in "
                f"{self.metrics.kept.name}."
            )
        self.tracker.stages(stage_rows(engine.blueprint.stages))

    def facts(self) -> dict[str, Any]:
        """What the run is made with, besides its configuration."""
        layout = self.layout
        return {"git": git_state(), "hardware": hardware(layout.device, self.hosts), "layout": degrees(layout)}

    def introduce(self, engine: Engine) -> None:
        """Show how large the model is, where it lives, and how it is cut into pipeline stages, if it is."""
        stages, layout = engine.blueprint.stages, engine.layout
        parameters = [(p.requires_grad, part.shape.numel()) for p, part in parameter_parts(engine.blueprint.plan)]
        trained = sum(size for is_trained, size in parameters if is_trained)
        self.display.note(
            f"{sum(size for _, size in parameters) / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained; "
            f"{layout.world_size} process{'es' * (layout.world_size > 1)} ({layout.device.type}): data "
            f"{layout.data_parallel_size} x pipeline {layout.config.pipeline} x tensor {layout.config.tensor}, ZeRO "
            f"stage {layout.config.zero_stage}; {self.config.run.precision}"
        )
        if len(stages) > 1:
            self.display.note(as_text(table(stages)))

    def record(self, line: Line) -> None:
        """One step's metrics, to the file, the tracker and the display."""
        if self.metrics is not None:
            self.metrics.write(line)
            self.tracker.log(line)
        self.display.step(line)

    def show(self, step: int, samples: list[Sample]) -> None:
        """Generated answers, as a picture and in the tracker."""
        if self.is_main_rank and samples:
            draw(samples, self.folder / "samples" / f"step_{step:08d}.png")
            self.tracker.samples(step, samples)

    def alert(self, title: str, text: str) -> None:
        """What a user should know even when not looking: on the display, and where the tracker sends alerts."""
        if self.is_main_rank:
            self.display.note(text)
            self.tracker.alert(title, text)

    def save_due(self) -> bool:
        """Whether enough wall clock has passed on this rank, or it knows that the last save failed: then saving, which
        all ranks do together, says so."""
        minutes = self.config.checkpoint.every_minutes
        long_ago = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return (self.is_main_rank and long_ago) or self.checkpointer.failed

    def save(self, engine: Engine, step: int, extra: Extra) -> None:
        """Begin a checkpoint; a collective of all ranks. Raises as `settle` if the one before could not be written."""
        try:
            own = {"tracker_run": self.tracker.run_id, "config": to_dict(self.config), "tokenizer": self.tokenizer}
            own["sources"] = self.sources
            self.checkpointer.save(engine, step, own | extra, trusted=not extra.get("bad"))
        except SaveFailed as error:
            raise_ended(error)
        self.saved_at = time.monotonic()

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises RunStopped if it could not be written, StorageFailed where that may pass.
        """
        try:
            self.checkpointer.wait()
        except SaveFailed as error:
            raise_ended(error)

    def roll_back(self, last_good: int, bad: list[int]) -> int:
        """Forget every checkpoint after step `last_good`, and leave the `bad` batches out from now on.

        Returns the step to go on after. A collective of all ranks. Whoever is killed in here starts again either before
        the bad batches, or without them. Raises RunStopped, with nothing forgotten, where steps were trained and no
        checkpoint of them is there.
        """
        try:
            self.settle()
        except RunStopped as error:
            if not isinstance(error.__cause__, NotFinite):  # whose weights the run goes back from
                raise
        oldest = self.layout.broadcast_from_main(lambda: min(self.checkpointer.steps(), default=None))
        if last_good and (oldest is None or oldest > last_good):
            raise RunStopped(
                f"The run stopped at step {last_good + len(bad)}: {len(bad)} steps in a row were skipped, and no "
                f"checkpoint of step {last_good} or before is in {self.checkpointer.folder} to go back to; bring one "
                "back from a copy, or start again in another run.folder with a smaller checkpoint.every_steps."
            )
        self.skipped_batches.batches += bad
        self.skipped_batches.roll_backs += 1
        if self.is_main_rank:
            self.checkpointer.forget_after(last_good)
            self.skipped_batches.write(self.folder)
        self.layout.barrier()
        return self.steps_done()

    def steps_done(self) -> int:
        """Of the newest checkpoint; a collective of all ranks."""
        return self.layout.broadcast_from_main(lambda: self.checkpointer.latest_step() or 0)

    def skipped_last(self) -> list[int]:
        """Return the batches of the newest checkpoint's row of skipped steps; a collective of all ranks."""
        return self.layout.broadcast_from_main(lambda: list(self.checkpointer.latest_extra().get("bad", ())))

    def close(self) -> None:
        """Flush everything and give the signals back."""
        try:
            self.checkpointer.wait()
        except RuntimeError as error:  # something else ends the run
            self.display.note(str(error))
        if self.metrics is not None:
            self.metrics.close()
        self.tracker.close()
        self.display.close()
        self.interrupt.restore()
        self.lock.release()


def raise_ended(error: SaveFailed) -> NoReturn:
    """Raise on every rank what a save that failed means for the run."""
    if not isinstance(error, SaveStalled):
        raise RunStopped(str(error)) from error
    failed = StorageFailed(str(error))
    failed.alone = False  # the first rank prints it
    raise failed from error
