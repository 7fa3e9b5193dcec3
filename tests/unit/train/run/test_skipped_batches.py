"""Which batch a step learns from once some are left out, and what a later process knows of it."""

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from train.run.skipped_batches import LeftOut


def test_steps_go_on_with_the_batches_that_are_left() -> None:
    left_out = LeftOut([5, 3, 4, 9])
    assert [left_out.batch_of(step) for step in range(1, 8)] == [1, 2, 6, 7, 8, 10, 11]
    assert [LeftOut().batch_of(step) for step in (1, 2, 300)] == [1, 2, 300]


def test_the_next_process_leaves_out_the_same(tmp_path: Path) -> None:
    assert LeftOut.read(tmp_path) == LeftOut([], 0)
    LeftOut([3, 4], 1).write(tmp_path)
    assert LeftOut.read(tmp_path) == LeftOut([3, 4], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["left_out.json"]


def test_a_file_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    for text in ("cut sho", '{"batches": [3], "other": 1}', "[]"):
        (tmp_path / "left_out.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match="bring it back from a copy, or remove it"):
            LeftOut.read(tmp_path)
