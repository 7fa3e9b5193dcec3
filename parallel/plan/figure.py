"""Draw a played step: a Gantt chart of every pipeline rank, and a stacked bar of the seconds by cause."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from parallel.plan.search import PhaseChoice, Search

COLORS = {"forward": "#7fb3d5", "backward": "#1f618d"}
CAUSES = {  # the same in every bar, whichever parts it has
    "compute vit": "#1f618d", "compute bridge": "#5499c7", "compute encoder": "#2e86c1", "compute decoder": "#85c1e9",
    "compute head": "#d6eaf8", "recomputation": "#7d3c98", "bubble": "#d5d8dc", "tensor-parallel messages": "#e67e22",
    "gathering parameters": "#f5b041", "summing gradients": "#c0392b", "update": "#1e8449", "host": "#566573",
}  # fmt: skip
SHOWN_ROUNDS = 3  # micro-batches for each stage that a chart shows


def draw(search: Search, choice: dict[str, PhaseChoice], path: Path) -> None:
    """Write a PNG: for each phase one chart of the schedule's first micro-batches, and one bar of its whole step."""
    ranks = max(own.parallel.pipeline for own in choice.values())
    height = max(3.0, 1.0 + 0.32 * ranks)
    figure, axes = plt.subplots(len(choice), 2, figsize=(15, height * len(choice)), squeeze=False,
                                width_ratios=(4, 1))  # fmt: skip
    for (left, right), phase in zip(axes, search.phases, strict=True):
        own = choice[phase.name]
        model, starts = search.step_model(phase, own.parallel)
        shown = min(model.pipeline.micro_batches, SHOWN_ROUNDS * model.pipeline.stages)
        _gantt(left, model.timeline(starts, shown).spans)
        left.set_title(f"{phase.name}: {shown} of {model.pipeline.micro_batches} micro-batches of a step", loc="left")
        right.set_title(f"whole step: {own.time.seconds:.2f} s, MFU {own.mfu:.0%}", loc="left")
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
        axis.barh([0], [0], color=color, label=kind)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, fontsize=8, frameon=False)


def _bar(axis, own: PhaseChoice) -> None:  # type: ignore[no-untyped-def]
    bottom = 0.0
    for name, seconds in own.time.parts().items():
        if seconds > 0.002 * own.time.seconds:
            axis.bar([0], [seconds], bottom=bottom, label=f"{name} {seconds:.3f} s", color=CAUSES[name])
            bottom += seconds
    axis.set(ylabel="seconds", xticks=[], xlim=(-0.6, 0.6))
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True, frameon=False)
