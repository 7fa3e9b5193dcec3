"""Draw the rows of a step, and print their lengths and fill by objective and language.

    python -m data.show mixture=miniature step=1
    python -m data.show mixture=miniature step=7 rows=8 output=step_7.png
    python -m data.show experiment=paper_3b data.root=/data/shards phases=frozen_224 step=381000 rows=4

Any other argument overrides the run's configuration (conf/pretrain.yaml), as `data.digest` has it. The step is read as
a run reads it, on all ranks together; `rows` of them are drawn.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from common.command_line import read_words, run_command
from common.files import beside, writes
from common.values import at_least, one_of
from data.digest import PHASE_READS, READS, open_stream
from data.error_budget import NothingUsable
from data.examples import ExampleInfo
from data.packing import Rows, RowShape
from data.shards.source import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#ff9da6", "#9d755d")
WIDTH, BAR, LINE, IMAGE, DPI = 12.0, 0.16, 0.19, 1.0, 75  # inches, and pixels of one
IMAGES_BEGIN, TEXTS_BEGIN = 1.0, 2.15  # inches below the top of a row
LONGEST_TEXT = 90  # characters of a prompt or target that are drawn


@dataclass
class ShowConfig:
    """Options of this command."""

    step: int = 1
    """Step that is drawn, counted from 1."""
    rows: int = 3
    """Rows that are drawn, the first of the step. 3 by default: as many as a page shows."""
    output: str = "rows.png"
    """File of the image. It lies in the working folder by default."""
    split: str = "train"
    """Split of the sources: train, validation or test. Training reads "train"."""

    def __post_init__(self) -> None:
        at_least("", 1, step=self.step, rows=self.rows)
        one_of("split", self.split, SPLITS)


@dataclass(frozen=True)
class Lengths:
    """Hold the positions of one example in its row."""

    info: ExampleInfo
    visual: int
    text: int
    target: int


def lengths(rows: Rows, infos: Iterable[ExampleInfo]) -> list[Lengths]:
    """Return the positions of each example, counted in the rows."""
    found = []
    for info in infos:
        own = rows["encoder_segments"][info.row] == info.segment
        visual = int((own & (rows["visual_index"][info.row] >= 0)).sum())
        target = int((rows["decoder_segments"][info.row] == info.segment).sum())
        found.append(Lengths(info, visual, int(own.sum()) - visual, target))
    return found


def table(title: str, examples: Sequence[Lengths], name: Callable[[ExampleInfo], str], positions: tuple[int, int],
          ) -> Table:  # fmt: skip
    """Return a table of mean lengths and of the share of all `positions` (encoder, decoder), by `name` of the infos."""
    made = Table(title=title)
    for column in ("", "examples", "visual", "text", "target", "longest text", "encoder", "decoder"):
        made.add_column(column, justify="right" if column else "left")
    names = sorted({name(one.info) for one in examples})
    for each in [*names, "all"]:
        own = [one for one in examples if each == "all" or name(one.info) == each]
        visual, text, target = (np.array([getattr(one, part) for one in own]) for part in ("visual", "text", "target"))
        made.add_row(
            each, f"{len(own):,}", *(f"{part.mean():.1f}" for part in (visual, text, target)), str(text.max()),
            f"{(visual.sum() + text.sum()) / positions[0]:.1%}", f"{target.sum() / positions[1]:.1%}",
            end_section=each == names[-1],
        )  # fmt: skip
    return made


def draw(rows: Rows, infos: Sequence[ExampleInfo], shape: RowShape, number: int, path: Path) -> None:
    """Write a PNG of the first `number` rows: images, positions by segment, prompts and targets; padding is white."""
    from matplotlib.figure import Figure

    examples = [[one for one in infos if one.row == row] for row in range(number)]
    heights = [TEXTS_BEGIN + LINE * (len(own) + 1) for own in examples]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DPI)
    bottom = sum(heights)
    for row, height in enumerate(heights):
        bottom -= height
        axes = figure.add_axes((0.01, bottom / sum(heights), 0.98, height / sum(heights)))
        axes.axis("off")
        _draw_positions(axes, rows, row)
        _draw_images(axes, rows, shape, row)
        _draw_texts(axes, examples[row])
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))  # inches, from the top
    with beside(path) as partial_file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of scripts that no font here has; boxes are drawn
        figure.savefig(partial_file, format="png", metadata={"Software": None})


def _draw_positions(axes: "Axes", rows: Rows, row: int) -> None:
    """Draw each side's positions as a bar: a color for each segment, hatched where they are visual tokens."""
    visual = rows["visual_index"][row] >= 0
    for top, side in ((0.05, "encoder"), (0.5, "decoder")):
        segments = rows["encoder_segments" if side == "encoder" else "decoder_segments"][row]
        parts = (visual, ~visual) if side == "encoder" else (segments < 0, segments > 0)
        title = f"row {row}, {side}: {len(segments):,} positions, {(segments > 0).mean():.1%} real"
        axes.text(0, top, title, fontsize=8, va="top")
        axes.barh(top + 0.2, WIDTH, BAR, 0, align="edge", color="white", edgecolor="gray", linewidth=0.5)
        for segment in range(1, segments.max(initial=0) + 1):
            for part, hatch in zip(parts, ("////", ""), strict=True):
                if len(places := np.flatnonzero((segments == segment) & part)):
                    left, width = (WIDTH * each / len(segments) for each in (places[0], len(places)))
                    axes.barh(top + 0.2, width, BAR, left, align="edge", color=_color(segment), hatch=hatch,
                              edgecolor="white", linewidth=0.5)  # fmt: skip


def _draw_images(axes: "Axes", rows: Rows, shape: RowShape, row: int) -> None:
    """Draw the images of a row in the order of their slots, with a frame in the color of their segment."""
    width = min(IMAGE, WIDTH / max(shape.images_per_row, 1))
    slot_at = rows["visual_index"][row] // shape.tokens_per_image - row * shape.images_per_row
    for slot in range(shape.images_per_row):
        segments = rows["encoder_segments"][row][(rows["visual_index"][row] >= 0) & (slot_at == slot)]
        if len(segments):
            place = (slot * width, (slot + 0.94) * width, IMAGES_BEGIN + 0.94 * width, IMAGES_BEGIN)
            axes.imshow(rows["images"][row * shape.images_per_row + slot], extent=place, aspect="auto")
            axes.plot([place[0], place[1]], [place[2] + 0.03] * 2, color=_color(int(segments[0])), linewidth=3)


def _draw_texts(axes: "Axes", infos: Sequence[ExampleInfo]) -> None:
    from common.glyphs import families, visual_order

    for line, info in enumerate(infos):
        kind = f"{info.segment}  {info.objective}, {info.language or 'no language'}: "
        text = visual_order(f"{_short(info.input_text)} → {_short(info.target_text)}", "L").replace("$", r"\$")
        axes.text(0, TEXTS_BEGIN + LINE * line, kind + text, fontsize=8, va="top", color=_color(info.segment),
                  clip_on=True, family=families(text))  # fmt: skip


def _color(segment: int) -> str:
    return COLORS[(segment - 1) % len(COLORS)]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} …"


def main(arguments: Sequence[str]) -> None:
    """Draw a step's rows and print its tables."""
    own, overrides = read_words(arguments, ShowConfig, "data.show", READS, PHASE_READS)
    stream = open_stream(overrides, own.split)
    rows, infos = stream.rows(own.step, range(stream.num_streams))
    if not infos:
        counted = ", ".join(f"{count} x {cause}" for cause, count in sorted(stream.ledger.drain().items()))
        raise NothingUsable(f"step={own.step} of the {own.split} split holds no example ({counted}).")
    examples, shape, number = lengths(rows, infos), stream.shape, len(rows["encoder_tokens"])
    positions = (number * shape.encoder_length, number * shape.decoder_length)
    console = Console(width=110)
    title = f"step {own.step}: {len(infos):,} examples in {number:,} rows of {shape.encoder_length} + "
    title += f"{shape.decoder_length} positions and {shape.images_per_row} images"
    console.print(table(title, examples, lambda info: info.objective, positions))
    console.print(table("by language", examples, lambda info: info.language or "no language", positions))
    with writes(f"output={own.output}"):
        draw(rows, infos, shape, min(own.rows, number), Path(own.output))
    print(f"{own.output}: {min(own.rows, number)} of {number:,} rows")


if __name__ == "__main__":
    run_command(main)
