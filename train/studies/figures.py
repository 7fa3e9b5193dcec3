"""Draw the figures of a study: cells beside each other, learning curves, and what each objective left out costs."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common.files import beside
from train.studies.read import SCORES, Results, curve, difference
from train.studies.tables import NAMES

CELLS = ("full", "vit_trained", "mt5_from_scratch", "scratch")
COLORS = ("#3b6ea5", "#7fb069", "#e6a23c", "#b5485d")
OBJECTIVES = tuple(SCORES)
LIMIT = 30  # points of difference at which the colors end


def draw_towers(results: Results, path: Path) -> None:
    """Write bars of the scores of four cells, and their accuracy of VQA over the steps, as PNG."""
    figure = Figure(figsize=(12.5, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2, width_ratios=(2, 1))
    for number, (cell, color) in enumerate(zip(CELLS, COLORS, strict=True)):
        found = [results.cell(objective, cell) for objective in OBJECTIVES]
        at = [place + 0.2 * (number - 1.5) for place, one in enumerate(found) if one]
        own = [one for one in found if one]
        errors = [one.half if len(one.seeds) == 1 else (max(one.seeds) - min(one.seeds)) / 2 for one in own]
        bars.bar(at, [one.mean for one in own], 0.19, yerr=errors, color=color, label=NAMES[cell], capsize=2)
        for folder in [one.folder for one in results.runs("cells", {"cell": cell})][:1]:
            curves.plot(*curve(folder, "accuracy/vqa"), color=color)
    for place, objective in enumerate(OBJECTIVES):
        full = results.cell(objective, "full")
        if full and full.blind is not None:
            bars.hlines(full.blind, place - 0.45, place + 0.45, color="#333333", ls=":", lw=1.2)
    bars.set_xticks(range(len(OBJECTIVES)), [name.replace("_", "\n") for name in OBJECTIVES], fontsize=9)
    bars.set_ylabel("score (percent)")
    bars.set_title("Test split; dotted: the full cell on blank images")
    if bars.containers:
        bars.legend(fontsize=8, loc="upper right")
    curves.set_xlabel("step")
    curves.set_ylabel("share of right target tokens")
    curves.set_title("VQA while training (mean of 25 steps)")
    for axes in (bars, curves):
        _plain(axes)
    _save(figure, path)


def draw_objectives(results: Results, path: Path) -> None:
    """Write a matrix of what each objective left out changes in each score, in points, as PNG."""
    figure = Figure(figsize=(8.5, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = np.full((len(OBJECTIVES), len(OBJECTIVES)), np.nan)
    for row, left_out in enumerate(OBJECTIVES):
        for column, objective in enumerate(OBJECTIVES):
            full = results.cell(objective, "full")
            own = results.cell(objective, f"without_{left_out}")
            if full and own:
                found = difference(own, full)
                values[row, column] = found.mean
                weight = "bold" if found.certain else "normal"
                axes.text(column, row, f"{found.mean:+.1f}", ha="center", va="center", fontsize=9, weight=weight)
    image = axes.imshow(values, cmap="RdBu", vmin=-LIMIT, vmax=LIMIT, alpha=0.75)
    axes.set_xticks(range(len(OBJECTIVES)), [name.replace("_", "\n") for name in OBJECTIVES], fontsize=9)
    axes.set_yticks(range(len(OBJECTIVES)), [f"without {name}" for name in OBJECTIVES], fontsize=9)
    axes.set_title("Difference from the full mixture (points; bold: outside the 95 % interval)", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.8, label="points")
    _save(figure, path)


def _plain(axes: Axes) -> None:
    axes.grid(color="#dddddd", lw=0.6, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    with beside(path) as partial:
        figure.savefig(partial, format="png")
