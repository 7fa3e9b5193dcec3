"""Predict whole runs on clusters of many sizes: a table, a figure, and where more devices stop paying.

    python -m benchmarks.curves figure=docs/scale.png              # docs/scale.md's tables: minutes
    python -m benchmarks.curves models=[pali_3b] gpus=[8,64]

Each size has its own search, under the defaults of `train.plan`: batch 4,096, `data=web`, phase `frozen_224`. Doubling
the devices pays while the run becomes at least 1.5 times as fast.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import log2
from pathlib import Path

from common.command_line import parse, run_command
from common.files import write_text
from common.values import PATH
from parallel.plan.campaign import DAY_S, simulate
from parallel.plan.hardware import GIB, read_hardware
from train.plan import layout_name, read_config
from train.settings.planning import make_search

PAYS = 1.5  # times as fast, for twice the devices
COLORS = ("#1f618d", "#c0392b", "#1e8449", "#7d3c98")
STYLES = ("-", "--", ":")


@dataclass
class Options:
    """Predict whole runs on clusters of many sizes."""

    models: list[str] = field(default_factory=lambda: ["pali_3b", "pali_15b", "pali_17b"])
    """Files of conf/model."""
    hardware: list[str] = field(default_factory=lambda: ["h100_sxm", "h200_sxm"])
    """Files of conf/hardware."""
    gpus: list[int] = field(default_factory=lambda: [8 * 2**n for n in range(10)])
    """Sizes of the cluster; 8 to 4,096 by default."""
    folder: str = field(default="runs/curves", metadata=PATH)
    """Folder of results: a size that has one there is not searched again."""
    figure: str | None = field(default=None, metadata=PATH)
    """PNG file of days and GPU-days over the size. Null by default: none."""


@dataclass(frozen=True)
class Point:
    """A predicted run on one cluster; `layout` is empty where none fits."""

    gpus: int
    layout: str = ""
    step_s: float = 0.0
    examples_per_s: float = 0.0
    mfu: float = 0.0
    memory_gib: float = 0.0
    bubble: float = 0.0
    exposed: float = 0.0
    training_days: float = 0.0
    days: float = 0.0
    days_90: float = 0.0
    gpu_days: float = 0.0
    mwh: float = 0.0


def predict(model: str, hardware_name: str, gpus: int) -> Point:
    """Search the best layout of a cluster, and simulate its whole run."""
    config, hardware = read_config([f"model={model}"]), read_hardware(hardware_name)
    search = make_search(config, hardware, gpus)
    found = search.run(most=1)
    if not found:
        return Point(gpus)
    (phase,) = found[0].phases.values()
    state = max(peak.stored for peak in phase.peaks)
    run = simulate(found[0].seconds, gpus, hardware.devices_per_node, hardware.power_w, state)
    seconds = phase.time.seconds
    return Point(
        gpus, layout_name(found[0]), seconds, search.phases[0].rows.global_batch_size / seconds, phase.mfu,
        phase.memory_bytes / GIB, phase.time.bubble_s / seconds, phase.time.communication_s / seconds,
        found[0].seconds / DAY_S, run.expected_days, run.days_90, run.device_days, run.energy_mwh,
    )  # fmt: skip


def curve(model: str, hardware: str, options: Options) -> list[Point]:
    """Return the points of a model on one kind of hardware, from files or by searching."""
    points = []
    for gpus in options.gpus:
        file = Path(options.folder) / f"{model}-{hardware}-{gpus}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(asdict(predict(model, hardware, gpus))))
        points.append(Point(**json.loads(file.read_text(encoding="utf-8"))))
    return points


def last_that_pays(points: Sequence[Point]) -> int:
    """Return the size up to which each doubling makes the run at least 1.5 times as fast."""
    fit = [point for point in points if point.layout]
    last = fit[0].gpus if fit else 0
    for before, after in pairwise(fit):
        if before.days / after.days < PAYS ** log2(after.gpus / before.gpus):
            break
        last = after.gpus
    return last


def rows(model: str, hardware: str, points: Sequence[Point]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = []
    for p in points:
        start = f"| {model} | {hardware} | {p.gpus:,} | "
        if not p.layout:
            lines.append(start + "none fits | | | | | | | | | | |")
            continue
        lines.append(
            start + f"{p.layout} | {p.step_s:.2f} s | {p.examples_per_s:,.0f} | {p.mfu:.0%} | {p.memory_gib:.0f} GiB | "
            f"{p.bubble:.0%} | {p.exposed:.0%} | {p.days:.1f} | {p.days_90:.1f} | {p.gpu_days:,.0f} | {p.mwh:,.0f} |"
        )
    return lines


def draw(curves: dict[tuple[str, str], list[Point]], path: Path) -> None:
    """Write a PNG: expected days, and GPU-days, over the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    models = list(dict.fromkeys(model for model, _ in curves))
    kinds = list(dict.fromkeys(kind for _, kind in curves))
    for (model, kind), points in curves.items():
        shown = [point for point in points if point.layout]
        look = {
            "color": COLORS[models.index(model) % len(COLORS)],
            "linestyle": STYLES[kinds.index(kind) % len(STYLES)],
            "label": f"{model}, {kind}",
        }
        gpus = [point.gpus for point in shown]
        left.plot(gpus, [point.days for point in shown], marker="o", markersize=3, **look)
        right.plot(gpus, [point.gpu_days for point in shown], marker="o", markersize=3, **look)
        last = last_that_pays(points)
        for axis, key in ((left, "days"), (right, "gpu_days")):
            axis.plot([last], [next(getattr(p, key) for p in shown if p.gpus == last)], "o", ms=9, mfc="none",
                      color=look["color"])  # fmt: skip
    sizes = sorted({point.gpus for points in curves.values() for point in points})
    for axis, title in ((left, "expected days of the run"), (right, "device-days of the run")):
        axis.set(xscale="log", yscale="log", xlabel="devices", title=title)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    left.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    right.set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"])
    right.legend(fontsize=8)
    figure.text(0.5, 0.01, "circles: the last size whose doubling made the run at least 1.5 times as fast", ha="center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: Options) -> None:
    """Print the tables as Markdown, and draw the figure."""
    curves = {(model, kind): curve(model, kind, options) for model in options.models for kind in options.hardware}
    print(
        "| model | hardware | GPUs | layout | step | examples/s | MFU | memory | bubble | exposed | days | 90 % | "
        "GPU-days | MWh |\n|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for (model, kind), points in curves.items():
        print("\n".join(rows(model, kind, points)))
    print()
    for (model, kind), points in curves.items():
        print(f"- {model} on {kind}: doubling pays up to {last_that_pays(points):,} devices.")
    if options.figure:
        draw(curves, Path(options.figure))
        print(f"figure: {options.figure}")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
