"""Draw a played step: a Gantt chart of every pipeline rank, and a stacked bar of the seconds by cause."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from parallel.plan.actions import FORWARD
from parallel.plan.search import PhaseChoice, Search

COLORS = {"forward": "#7fb3d5", "backward": "#1f618d"}
SHOWN_ROUNDS = 3  # micro-batches for each stage that a chart shows


def draw(search: Search, choice: dict[str, PhaseChoice], path: Path) -> None:
    """Write a PNG: for each phase one chart of the schedule's first micro-batches, and one bar of its whole step."""
    figure, axes = plt.subplots(len(choice), 2, figsize=(15, 1.5 + 2.8 * len(choice)), squeeze=False,
                                width_ratios=(3, 1))  # fmt: skip
    for (left, right), phase in zip(axes, search.phases, strict=True):
        own = choice[phase.name]
        model, starts = search.step_model(phase, own.parallel)
        shown = min(model.pipeline.micro_batches, SHOWN_ROUNDS * model.pipeline.stages)
        _gantt(left, model.timeline(starts, shown).spans)
        left.set_title(f"{phase.name}: {shown} of {model.pipeline.micro_batches} micro-batches")
        _bar(right, own)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _gantt(axis, spans) -> None:  # type: ignore[no-untyped-def]
    for span in spans:
        width = span.end_s - span.start_s
        axis.barh(span.rank, width, left=span.start_s, color=COLORS[span.kind], edgecolor="white", linewidth=0.5)
        if len(spans) <= 200:
            axis.text(span.start_s + width / 2, span.rank, str(span.micro_batch), ha="center", va="center", fontsize=6)
    ranks = sorted({span.rank for span in spans})
    axis.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    for kind, color in COLORS.items():
        axis.barh([0], [0], color=color, label="forward" if kind == FORWARD else "backward")
    axis.legend(loc="upper right", fontsize=7)


def _bar(axis, own: PhaseChoice) -> None:  # type: ignore[no-untyped-def]
    bottom = 0.0
    for name, seconds in own.time.parts().items():
        if seconds > 0.002 * own.time.seconds:
            axis.bar(["step"], [seconds], bottom=bottom, label=f"{name} {seconds:.3f} s")
            bottom += seconds
    axis.set_ylabel("seconds of a step")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
