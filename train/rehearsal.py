"""Rehearse a run: do once all that each phase does, and measure memory and time.

Each phase makes its first step with its update, saves and loads a checkpoint, validates on one batch and predicts. All
of it happens in `<run.folder>/rehearsal`, which is removed at the end, so that the run's own folder stays unchanged.
"""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

from data.tokenizer import Tokenizer
from parallel.checkpoint.folder import CheckpointFolder
from parallel.distributed import gather_objects
from parallel.layout import Layout
from parallel.plan.blueprint import Plan
from train.build import build_phase_engine
from train.config import RunConfig, WeightsConfig
from train.health.device_queue import DeviceQueue
from train.health.memory import GIB
from train.health.profiling import explain_lack_of_memory
from train.health.watchdog import Watchdog
from train.phases import Span, for_phase, spans
from train.run.display import as_text
from train.run.run import Run
from train.step.loop import Loop
from train.step.predict import predictions
from train.step.reader import ReplicaReader
from train.step.validation import Validation

NAME = "rehearsal"
NEVER = 10**12  # steps


@dataclass
class Measured:
    """Peak bytes of the fullest rank and seconds of the slowest one, for one part of a phase."""

    phase: str
    part: str
    peak_bytes: int
    seconds: float


@dataclass
class Measuring:
    """Measure the parts of a rehearsal, on all ranks at once."""

    device: torch.device
    found: list[Measured] = field(default_factory=list)

    @contextmanager
    def part(self, phase: str, name: str) -> Iterator[None]:
        """Measure the body of the `with` statement; a collective."""
        reset_peak(self.device)
        began = time.perf_counter()
        yield
        every_rank = gather_objects([(peak_bytes(self.device), time.perf_counter() - began)])
        peaks, seconds = zip(*every_rank, strict=True)
        self.found.append(Measured(phase, name, max(peaks), max(seconds)))


def rehearse(config: RunConfig, layout: Layout, plans: Mapping[str, Plan]) -> list[Measured]:
    """Rehearse every phase, print memory and time of its parts, and leave nothing behind.

    `plans`: the phases' models, planned by the checks; they are used up.
    """
    folder = Path(config.run.folder, NAME)
    was_there = layout.broadcast_from_main(Path(config.run.folder).exists)
    rehearsed = rehearsal_config(config, folder)
    measuring = Measuring(layout.device)
    with closing(Run(rehearsed, layout)) as run, removed(folder, layout, with_parent=not was_there):
        with (
            Watchdog(config.parallel.timeout_s, folder, layout.rank, layout.world_size, DeviceQueue(layout.device)),
            explain_lack_of_memory(config.profile, folder, layout.rank, layout.device),
        ):
            for span in spans(config):
                rehearse_phase(run, span, plans[span.name], measuring)
            run.records.note(as_text(table(measuring.found, layout.device)))
            run.records.note(f"{config.run.folder}: rehearsed. Without run.rehearse=true the same command trains.")
        layout.barrier()
    return measuring.found


@contextmanager
def removed(folder: Path, layout: Layout, with_parent: bool) -> Iterator[None]:
    """Remove the folder at the end.

    Enter it while the folder's lock is held, so that it removes no folder of another rehearsal.
    """
    try:
        yield
    finally:
        if layout.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            if with_parent:
                with suppress(OSError):  # not empty: it holds other files by now
                    folder.parent.rmdir()


def rehearsal_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings with another folder and no tracker, starting from the weights that the run would resume."""
    begun = CheckpointFolder.from_run(config.run.folder).steps()
    settings, weights = replace(config.run, folder=str(folder)), config.weights
    if begun:
        settings = replace(settings, initial=config.run.folder)
        weights = WeightsConfig()
    return replace(
        config,
        run=settings,
        weights=weights,
        tracker=replace(config.tracker, name="none"),
        checkpoint=replace(config.checkpoint, keep_last=1, keep_every=0),
        evaluation=replace(config.evaluation, every_steps=config.evaluation.every_steps and NEVER, steps=1),
    )


def rehearse_phase(run: Run, span: Span, plan: Plan, measuring: Measuring) -> None:
    """Make the first step of a phase, then a checkpoint, validation and predictions."""
    config, step, name = for_phase(run.config, span), span.first, span.name
    with measuring.part(name, "model and weights"):
        checkpoints = run.checkpoints
        restored, given = checkpoints.restores(), checkpoints.first_names()
        engine = build_phase_engine(config, span.phase, run.layout, restored, plan, given)
        _, extra = run.checkpoints.restore(engine)
    tokenizer = Tokenizer(config.data.tokenizer)
    validation = Validation(config, run.layout, tokenizer)
    with closing(ReplicaReader(config, run.layout, tokenizer, config.mixture, "train")) as reader:
        loop = Loop(config, span, run, engine, reader, validation, extra)
        with measuring.part(name, "step and update"), loop.waiting, loop.reader:
            loop.step(step)
        with measuring.part(name, "checkpoint"):
            loop.save(step)
            run.checkpoints.settle()
        with measuring.part(name, "load"):
            run.checkpoints.restore(engine)
        if config.evaluation.every_steps:
            with measuring.part(name, "validation"):
                validation.losses(engine)
        with measuring.part(name, "predictions"):
            if config.evaluation.every_steps and config.evaluation.samples:
                validation.samples(engine)
            else:  # the run makes no predictions, but its evaluation will
                list(predictions(engine, reader.held_out(1, 1), tokenizer, config))


def table(found: list[Measured], device: torch.device) -> Table:
    """Return a table with one row for each part of each phase."""
    kind = "allocated on the GPU" if device.type == "cuda" else "resident in RAM"
    shown = Table(title=f"rehearsal: peak memory of the fullest rank ({kind})")
    for heading in ("phase", "part", "peak memory", "time"):
        shown.add_column(heading, justify="left" if heading in ("phase", "part") else "right")
    for part in found:
        shown.add_row(part.phase, part.part, f"{part.peak_bytes / GIB:.2f} GiB", f"{part.seconds:.1f} s")
    return shown


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory; where the system refuses, the peak remains that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_bytes(device: torch.device) -> int:
    """Return the peak of this process since `reset_peak`: allocated on the GPU, otherwise resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
