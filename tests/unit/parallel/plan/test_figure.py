"""The figure of a step shows every pass of the schedule and every second of the step."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from parallel.plan import figure
from tests.unit.parallel.plan.tiny import FROZEN, LONGER, ROWS, search


def test_the_figure_shows_passes_and_causes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = search(2, FROZEN, LONGER)
    choice = next(each for each in own.run(most=100) if each.parallel.pipeline == 2)
    for name, one in choice.phases.items():  # more micro-batches in the first phase than are shown
        choice.phases[name] = replace(one, parallel=replace(one.parallel, micro_batch_size=1))
    kept = []
    monkeypatch.setattr(figure.plt, "close", kept.append)
    path = tmp_path / "step.png"
    figure.draw(own, choice.phases, path)
    monkeypatch.undo()
    (drawn,) = kept
    with Image.open(path) as image:
        assert image.size == (pytest.approx(15 * 110, abs=2), pytest.approx(2 * 3.0 * 110, abs=2))
    assert len(drawn.axes) == 4
    assert drawn.axes[0].get_title(loc="left") == "frozen: 6 of 12 micro-batches of a step"
    for (left, right), phase in zip((drawn.axes[:2], drawn.axes[2:]), own.phases, strict=True):
        one = choice.phases[phase.name]
        model, starts = own.step_model(phase, one.parallel)
        shown = min(model.pipeline.micro_batches, 3 * model.pipeline.stages)
        spans = model.timeline(starts, shown).spans
        bars = left.patches[: len(spans)]
        assert [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in bars] == [
            (pytest.approx(span.start_s), pytest.approx(span.end_s - span.start_s), pytest.approx(span.rank))
            for span in spans
        ]
        colors = {span.kind: bar.get_facecolor() for span, bar in zip(spans, bars, strict=True)}
        assert len(set(colors.values())) == 2
        assert [text.get_text() for text in left.texts] == [str(span.micro_batch) for span in spans]
        assert [text.get_position()[0] for text in left.texts] == pytest.approx(
            [(span.start_s + span.end_s) / 2 for span in spans]
        )
        assert [label.get_text() for label in left.get_yticklabels()] == ["rank 0", "rank 1"]
        assert left.get_title(loc="left") == (
            f"{phase.name}: {shown} of {model.pipeline.micro_batches} micro-batches of a step"
        )
        assert right.get_title(loc="left") == f"whole step: {one.time.seconds:.2f} s, MFU {one.mfu:.0%}"
        parts = {name: s for name, s in one.time.parts().items() if s > 0.002 * one.time.seconds}
        assert [bar.get_height() for bar in right.patches] == pytest.approx(list(parts.values()))
        tops = [bar.get_y() + bar.get_height() for bar in right.patches]
        assert [bar.get_y() for bar in right.patches] == pytest.approx([0.0, *tops[:-1]])
        assert [text.get_text() for text in right.get_legend().get_texts()] == [
            f"{name} {s:.3f} s" for name, s in reversed(parts.items())
        ]
        assert left.yaxis_inverted() and left.get_xlabel() == right.get_ylabel() == "seconds"
        assert [text.get_text() for text in left.get_legend().get_texts()] == ["forward", "backward"]
    figure.plt.close(drawn)


def test_a_figure_of_many_ranks_is_higher(tmp_path: Path) -> None:
    own = search(7, replace(FROZEN, rows=ROWS))
    (one,) = search(2).run(most=1)[0].phases.values()
    wide = replace(one, parallel=replace(one.parallel, pipeline=7, zero_stage=0, tensor=1, sequence=False))
    figure.draw(own, {"frozen": wide}, tmp_path / "step.png")
    with Image.open(tmp_path / "step.png") as image:
        assert image.size[1] == pytest.approx((1 + 0.32 * 7) * 110, abs=2)
