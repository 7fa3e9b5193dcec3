"""The image and the tables of a step are those of its rows."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from common.errors import ConfigurationError
from common.glyphs import families
from data import show
from data.stream import Stream


def test_lengths_and_fill_are_those_of_the_rows(stream: Stream) -> None:
    rows, infos = stream.rows(1, range(4))
    found = show.lengths(rows, infos)
    assert sum(one.visual + one.text for one in found) == (rows["encoder_segments"] > 0).sum()
    assert sum(one.target for one in found) == (rows["decoder_segments"] > 0).sum()
    assert {one.visual for one in found} == {0, 4} and {one.info.objective for one in found if not one.visual} == {
        "span_corruption"
    }
    positions = (rows["encoder_segments"].size, rows["decoder_segments"].size)
    columns = [list(column.cells) for column in show.table("", found, lambda info: info.objective, positions).columns]
    names, counts, encoder = columns[0], columns[1], columns[-2]
    assert names == [*sorted({info.objective for info in infos}), "all"]
    assert sum(map(int, counts[:-1])) == int(counts[-1]) == len(infos) == 24
    assert encoder[-1] == f"{(rows['encoder_segments'] > 0).mean():.1%}"


def test_a_row_is_drawn_with_its_positions_and_images(stream: Stream, tmp_path: Path) -> None:
    rows, infos = stream.rows(1, range(4))
    show.draw(rows, infos, stream.shape, 2, tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as opened:
        drawn = np.asarray(opened.convert("RGB")).astype(int)
    bar = drawn[round((0.05 + 0.2 + show.BAR / 2) * show.DPI)]  # through the encoder's positions of the first row
    inside = slice(round(0.01 * drawn.shape[1]) + 2, round(0.99 * drawn.shape[1]) - 2)
    places = np.linspace(0, len(rows["encoder_segments"][0]) - 1, len(bar[inside])).astype(int)
    text = (rows["encoder_segments"][0] > 0) & (rows["visual_index"][0] < 0)
    for segment in range(1, rows["encoder_segments"][0].max() + 1):
        own = (rows["encoder_segments"][0][places] == segment) & text[places]
        wanted = np.array(to_rgb(show._color(segment))) * 255
        assert (np.abs(bar[inside][own] - wanted).max(1) < 8).mean() > 0.8
    padding = rows["encoder_segments"][0][places] == 0
    assert padding.sum() == 0 or (bar[inside][padding] > 247).mean() > 0.8


def test_letters_that_dejavu_lacks_take_another_font() -> None:
    assert families("a Жא") == ["DejaVu Sans"]
    assert len(families("a \U0001d4d0")) == 2  # of mathematics: Matplotlib carries STIX too


def test_the_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"data.root={corpus}", "data=miniature", "mixture=miniature", "step=2", "rows=1"]
    show.main([*words, f"output={tmp_path}/rows.png", "data.global_batch_size=8"])
    printed = capsys.readouterr().out
    assert "step 2: 8 examples in" in printed and "by language" in printed and "rows.png: 1 of " in printed
    with Image.open(tmp_path / "rows.png") as opened:
        assert opened.width == show.WIDTH * show.DPI
    for word, sentence in (
        ("step=0", "step=0 must be at least 1"),
        ("output=/proc/rows.png", "output=/proc/rows.png cannot"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            show.main([*words, "data.global_batch_size=8", word])
