"""Hold what a run needs besides its model and data: folder, checkpoints, records, signals, skipped batches."""

import socket
from pathlib import Path
from typing import Any

from common.git import git_state
from parallel.engine.base import Engine
from parallel.layout import Layout
from train.config import RunConfig
from train.health.signals import StopSignals
from train.run.checkpoints import Extra, RunCheckpoints
from train.run.folder import take_folder
from train.run.provenance import degrees, hardware
from train.run.records import Records
from train.run.resume import note, note_sources
from train.run.skipped_batches import SkippedBatches
from train.settings.saved_run import convert


class Run:
    """Hold the folder of a run and its parts, from the lock to `close`; making it is a collective of all ranks."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout, self.folder = config, layout, Path(config.run.folder)
        self.is_main_rank = layout.rank == 0
        self.lock = take_folder(self.folder, layout, config.parallel.timeout_s / 2)  # the other ranks wait too
        self.checkpoints = RunCheckpoints(config, layout)
        self.records = Records(config, layout.rank)
        self.signals = StopSignals()
        self.skipped_batches: SkippedBatches = layout.broadcast_from_main(
            lambda: SkippedBatches.from_folder(self.folder)
        )
        self.hosts: list[str] = layout.gather_objects([socket.gethostname()])

    def begin(self, step: int, extra: Extra, engine: Engine) -> None:
        """Open the records of a run at a restored step, or truncate the open ones to it."""
        if self.records.begin(step, extra.get("tracker_run"), self.facts) and step:
            changes = (
                note(convert(extra.get("config") or {}), self.config, step),
                note_sources(extra.get("sources"), self.checkpoints.sources, step),
            )
            for changed in filter(None, changes):
                self.records.note(changed)
        self.records.show_stages(engine)

    def facts(self) -> dict[str, Any]:
        """Return what the run is made with, besides its configuration."""
        layout = self.layout
        return {"git": git_state(), "hardware": hardware(layout.device, self.hosts), "layout": degrees(layout)}

    def save(self, engine: Engine, step: int, extra: Extra) -> None:
        """Begin a checkpoint; a collective of all ranks. Raises as `RunCheckpoints.settle` does."""
        self.checkpoints.save(engine, step, {"tracker_run": self.records.tracker.run_id} | extra)

    def roll_back(self, last_good: int, bad: list[int]) -> int:
        """Remove every checkpoint after step `last_good`, and leave the `bad` batches out from now on.

        Returns the step to continue after. A collective of all ranks. A process that is killed here resumes either
        before the bad batches, or without them. Raises RunStopped, with nothing removed, where steps were trained and
        no checkpoint of them exists.
        """
        self.checkpoints.check_older(last_good, len(bad))
        self.skipped_batches.batches += bad
        self.skipped_batches.roll_backs += 1
        if self.is_main_rank:
            self.checkpoints.checkpointer.forget_after(last_good)
            self.skipped_batches.write(self.folder)
        self.layout.barrier()
        return self.checkpoints.steps_done()

    def close(self) -> None:
        """Wait for the last checkpoint, close the records, restore the signals and release the folder."""
        try:
            self.checkpoints.checkpointer.wait()
        except RuntimeError as error:  # another error ends the run already
            self.records.note(str(error))
        self.records.close()
        self.signals.restore()
        self.lock.release()
