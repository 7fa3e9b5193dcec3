"""Draw the joint-scaling figure: score over parameters and training arithmetic, and the return of larger towers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from common.files import beside
from train.scaling.read import Return, Score, Trained, lines_of_constant

MARKERS = "osD^vP*X"
INK, GRID = "#333333", "#dddddd"


def draw(runs: Sequence[Trained], found: Sequence[Return], score: Score, path: Path) -> None:
    """Write the figure as PNG: colors are mT5s, markers are ViTs."""
    figure = Figure(figsize=(12.5, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    by_parameters, by_tflop, by_return = figure.subplots(1, 3)
    look = Look(runs)
    name = score.key.removeprefix("evaluation/").replace("/", " ").replace("_", " ")
    better = "lower" if score.lower_is_better else "higher"
    for axes, quantity, label in (
        (by_parameters, "parameters", "parameters (million)"),
        (by_tflop, "training_tflop", "training arithmetic (TFLOP)"),
    ):
        _scores(axes, runs, quantity, look)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{name}\n({score.unit}; {better} is better)")
    by_parameters.set_title("Score against size")
    by_tflop.set_title("Score against training arithmetic")
    _returns(by_return, found, look)
    by_return.set_title("Return per added parameter")
    by_return.set_xlabel("the tower that grows")
    by_return.set_ylabel(f"gain per million added parameters\n({score.unit})")
    figure.legend(handles=look.legend(), loc="outside lower center", ncols=len(look.colors) + len(look.markers) + 2)
    with beside(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or "png")


class Look:
    """Assign a color to every mT5 and a marker to every ViT, smallest first."""

    def __init__(self, runs: Sequence[Trained]) -> None:
        mt5s, vits = lines_of_constant(runs, "mt5"), lines_of_constant(runs, "vit")
        shades = [colormaps["viridis"](0.85 * i / max(1, len(mt5s) - 1)) for i in range(len(mt5s))]
        self.colors = dict(zip(mt5s, shades, strict=True))
        self.markers = {vit: MARKERS[i % len(MARKERS)] for i, vit in enumerate(vits)}

    def legend(self) -> list[Line2D]:
        """Return the entries for colors, markers and lines."""
        towers = [Line2D([], [], color=color, lw=4, label=f"mT5 {mt5}") for mt5, color in self.colors.items()]
        towers += [
            Line2D([], [], color=INK, marker=marker, ls="", label=f"ViT {vit}") for vit, marker in self.markers.items()
        ]
        return [
            *towers,
            Line2D([], [], color=INK, label="same mT5, larger ViT"),
            Line2D([], [], color=INK, ls=":", label="same ViT, larger mT5"),
        ]


def _scores(axes: Axes, runs: Sequence[Trained], quantity: str, look: Look) -> None:
    scale = 1e-6 if quantity == "parameters" else 1.0

    def points(line: Sequence[Trained]) -> tuple[list[float], list[float]]:
        return [scale * getattr(run, quantity) for run in line], [run.score for run in line]

    for line in lines_of_constant(runs, "vit").values():
        axes.plot(*points(line), color="#888888", ls=":", lw=1)
    for mt5, line in lines_of_constant(runs, "mt5").items():
        axes.plot(*points(line), color=look.colors[mt5], lw=1.5)
    for run in runs:
        axes.plot(
            *points([run]), color=look.colors[run.mt5], marker=look.markers[run.vit], ms=8, markeredgecolor="white"
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _plain(axes)


def _returns(axes: Axes, found: Sequence[Return], look: Look) -> None:
    """Draw one group of bars per step to a larger tower, one bar per tower beside it."""
    groups: dict[tuple[str, str, str], list[Return]] = {}
    for one in found:
        groups.setdefault((one.tower, one.smaller, one.larger), []).append(one)
    x, ticks = 0.0, []
    for own in groups.values():
        start = x
        for one in own:
            color = look.colors[one.beside] if one.tower == "vit" else "#bbbbbb"
            axes.bar(x, one.gain_per_million, width=0.9, color=color)
            if one.tower == "mt5":
                axes.plot(x, one.gain_per_million, marker=look.markers[one.beside], color=INK, ms=6, ls="")
            x += 1
        ticks.append((start + x - 1) / 2)
        x += 0.8
    labels = [f"{'ViT' if tower == 'vit' else 'mT5'}\n{a}\nto {b}" for tower, a, b in groups]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.axhline(0, color=INK, lw=0.8)
    _plain(axes)
    axes.grid(axis="x", visible=False)


def _plain(axes: Axes) -> None:
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
