"""Write what a run reports: metrics and samples to files, all of it to tracker and terminal."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluation.sample_sheet import Sample, draw
from model.layers import parameter_parts
from parallel.engine.base import Engine
from parallel.plan.cut import table
from train.config import RunConfig, to_yaml
from train.run.display import as_text, open_display
from train.run.kept_files import replace_text
from train.run.metrics_file import Line, MetricsFile
from train.run.provenance import stage_rows
from train.run.tracking import Tracker, open_tracker
from train.settings.saved_run import NAME


class Records:
    """Write metrics, samples and messages on the main rank; every other rank writes nothing."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        self.config, self.folder, self.rank = config, Path(config.run.folder), rank
        self.display = open_display(config.run.name, config.run.steps, rank)
        self.tracker = Tracker()  # until `begin`
        self.metrics: MetricsFile | None = None

    def begin(self, step: int, tracker_run: str | None, facts: Callable[[], Mapping[str, Any]]) -> bool:
        """Open metrics and tracker at a restored step, or truncate the open ones to it; return whether it opened them.

        `tracker_run`: the tracker's id in the restored checkpoint; `facts`: what the run is made with.
        """
        if opens := self.metrics is None and self.rank == 0:
            self._open(step, tracker_run, facts())
        elif self.metrics is not None:
            self.metrics.forget_after(step)
        if self.metrics is not None and self.metrics.kept is not None:
            self.note(
                f"{self.folder} holds no checkpoint, so it begins anew; the metrics until now are kept in "
                f"{self.metrics.kept.name}."
            )
        return opens

    def _open(self, step: int, tracker_run: str | None, facts: Mapping[str, Any]) -> None:
        replace_text(self.folder / NAME, to_yaml(self.config))
        file = self.folder / "metrics.jsonl"
        had_metrics = file.exists()
        self.metrics = MetricsFile(file, step)
        if step and not had_metrics:
            self.note(f"{file} is not there any more; a new one begins after step {step}.")
        self.tracker = open_tracker(self.config, self.folder, tracker_run, self.rank, facts)
        if step:
            self.alert("restart", f"{self.folder}: resumed after step {step}")
        else:
            self.note(f"{self.folder}: a new run")

    def introduce(self, engine: Engine) -> None:
        """Show the model's size, its layout and its pipeline stages, and send the stages to the tracker."""
        stages, layout = engine.blueprint.stages, engine.layout
        parameters = [(p.requires_grad, part.shape.numel()) for p, part in parameter_parts(engine.blueprint.plan)]
        trained = sum(size for is_trained, size in parameters if is_trained)
        self.note(
            f"{sum(size for _, size in parameters) / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M of them trained; "
            f"{layout.world_size} process{'es' * (layout.world_size > 1)} ({layout.device.type}): data "
            f"{layout.data_parallel_size} x pipeline {layout.config.pipeline} x tensor {layout.config.tensor}, ZeRO "
            f"stage {layout.config.zero_stage}; {self.config.run.precision}"
        )
        if len(stages) > 1:
            self.note(as_text(table(stages)))

    def show_stages(self, engine: Engine) -> None:
        """Send the pipeline stages of an engine to the tracker."""
        self.tracker.stages(stage_rows(engine.blueprint.stages))

    def record(self, line: Line) -> None:
        """Write the metrics of one step to the file, the tracker and the display."""
        if self.metrics is not None:
            self.metrics.write(line)
            self.tracker.log(line)
        self.display.step(line)

    def show(self, step: int, samples: list[Sample]) -> None:
        """Draw predictions into `samples/`, and send them to the tracker."""
        if self.rank == 0 and samples:
            draw(samples, self.folder / "samples" / f"step_{step:08d}.png")
            self.tracker.samples(step, samples)

    def note(self, text: str) -> None:
        """Print a line on the main rank."""
        self.display.note(text)

    def alert(self, title: str, text: str) -> None:
        """Print a line, and send it where the tracker sends alerts, such as by mail."""
        if self.rank == 0:
            self.display.note(text)
            self.tracker.alert(title, text)

    def close(self) -> None:
        """Close the file, the tracker and the display."""
        if self.metrics is not None:
            self.metrics.close()
        self.tracker.close()
        self.display.close()
