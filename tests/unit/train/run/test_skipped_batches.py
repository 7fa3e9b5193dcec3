"""Left-out batches are skipped by every later step, and by every later process."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from data.examples import ExampleInfo
from train.run.skipped_batches import MOST_FILES, SkippedBatches, save_bad_batch
from train.step.batch import identify


def test_steps_continue_with_the_remaining_batches() -> None:
    left_out = SkippedBatches([5, 3, 4, 9])
    assert [left_out.batch_number(step) for step in range(1, 8)] == [1, 2, 6, 7, 8, 10, 11]
    assert [SkippedBatches().batch_number(step) for step in (1, 2, 300)] == [1, 2, 300]


def test_the_next_process_leaves_out_the_same(tmp_path: Path) -> None:
    assert SkippedBatches.from_folder(tmp_path) == SkippedBatches([], 0)
    SkippedBatches([3, 4], 1).write(tmp_path)
    assert SkippedBatches.from_folder(tmp_path) == SkippedBatches([3, 4], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["left_out.json"]


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for text in ("cut sho", '{"batches": [3], "other": 1}', "[]"):
        (tmp_path / "left_out.json").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigurationError, match="bring it back from a copy, or remove it"):
            SkippedBatches.from_folder(tmp_path)


def test_the_examples_of_a_bad_step_are_saved(tmp_path: Path) -> None:
    example = {"source": "webli", "key": "é1", "objective": "ocr"}
    path = save_bad_batch(tmp_path, 7, "loss is not finite", [example])
    assert path.name == "bad_batch_step_00000007.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "step": 7,
        "cause": "loss is not finite",
        "examples": [example],
    }


def test_only_the_newest_files_of_bad_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, MOST_FILES + 4):
        save_bad_batch(tmp_path, step, "loss is not finite", [])
    save_bad_batch(tmp_path, 1, "loss is not finite", [])  # once more, after a roll-back
    kept = sorted(int(file.stem[-8:]) for file in tmp_path.iterdir())
    assert kept == [1, *range(5, MOST_FILES + 4)]


def test_long_texts_are_shortened_and_broken_ones_are_written(tmp_path: Path) -> None:
    info = ExampleInfo("webli", "ocr", "k", "shard", "en", "x" * 1000, "half a pair: \ud83d")
    (example,) = identify([info])
    assert example["input_text"] == "x" * 200 + " … (800 more characters)"
    path = save_bad_batch(tmp_path, 7, "loss is not finite", [example])
    assert json.loads(path.read_text(encoding="utf-8"))["examples"] == [example]
