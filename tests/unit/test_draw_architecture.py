"""The figure of docs/architecture.md is drawn from the units of the code."""

from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from docs import draw_architecture
from model.costs import unit_costs
from model.describe import one_example, read_model
from model.pali import plan_on_meta


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw_architecture.main([f"output={tmp_path / 'architecture.png'}"])
    with Image.open(tmp_path / "architecture.png") as drawn, Image.open("docs/architecture.png") as committed:
        assert drawn.size == committed.size and len(drawn.getcolors(drawn.width * drawn.height)) > 100


def test_blocks_fill_the_width_without_overlap() -> None:
    config, frozen = read_model(draw_architecture.OVERRIDES)
    plan = plan_on_meta(config, frozen)
    costs = list(unit_costs(plan.units(), one_example(config, 32, 32)))
    places = list(draw_architecture.place(costs).values())
    assert places[0][0] == draw_architecture.LEFT
    assert sum(places[-1]) == pytest.approx(draw_architecture.RIGHT)
    assert all(x + width <= after + 1e-9 for (x, width), (after, _) in pairwise(places))
