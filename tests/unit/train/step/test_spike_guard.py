"""Which losses are refused, and when a run gives up."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest

from common.errors import RunStopped
from data.examples import ExampleInfo
from train.config import GuardConfig
from train.step.batch import identities
from train.step.spike_guard import MOST_BATCHES, Guard, check_end, save_bad_batch, stopped

SETTINGS = GuardConfig(spike_factor=3.0, spike_margin=1.0, window=5, max_in_a_row=3)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_from_the_first_step(loss: float) -> None:
    assert Guard(SETTINGS).verdict(loss) == "loss is not finite"


def test_spikes_are_told_from_noise_once_the_window_is_full() -> None:
    guard = Guard(SETTINGS)
    for loss in (9.0, 5.0, 2.0, 2.0, 2.0):
        assert guard.verdict(100.0) is None
        guard.accept(loss)
    assert guard.verdict(5.9) is None
    assert guard.verdict(6.1) == "loss spikes to 6.1 (median 2)"


def test_small_losses_may_grow_by_any_factor_up_to_the_margin() -> None:
    guard = Guard(SETTINGS, recent=[0.1] * 5)
    assert guard.verdict(1.05) is None
    assert guard.verdict(1.15) is not None


def test_gives_up_after_bad_steps_in_a_row_only() -> None:
    guard = Guard(SETTINGS)
    for batch in (1, 2):
        guard.refuse(batch)
    guard.accept(1.0)
    told = []
    for batch in (4, 5, 6):
        guard.refuse(batch)
        told.append(guard.gives_up)
    assert told == [False, False, True] and guard.bad == [4, 5, 6]


def test_a_restored_guard_judges_as_the_old_one() -> None:
    guard = Guard(SETTINGS)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        guard.accept(loss)
    restored = Guard(SETTINGS, json.loads(json.dumps(guard.state)))
    assert [restored.verdict(x) for x in (11.9, 12.1)] == [guard.verdict(x) for x in (11.9, 12.1)]


def test_the_examples_of_a_bad_step_are_saved(tmp_path: Path) -> None:
    example = {"source": "webli", "key": "é1", "objective": "ocr"}
    path = save_bad_batch(tmp_path, 7, "loss is not finite", [example])
    assert path.name == "bad_batch_step_00000007.json"
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "step": 7,
        "cause": "loss is not finite",
        "examples": [example],
    }
    assert str(tmp_path) in str(stopped(7, 3, "loss is not finite", tmp_path))


def test_few_files_of_bad_steps_are_kept_and_the_newest_of_all(tmp_path: Path) -> None:
    for step in range(1, MOST_BATCHES + 4):
        save_bad_batch(tmp_path, step, "loss is not finite", [])
    save_bad_batch(tmp_path, 1, "loss is not finite", [])  # once more, after a roll-back
    kept = sorted(int(file.stem[-8:]) for file in tmp_path.iterdir())
    assert kept == [1, *range(5, MOST_BATCHES + 4)]


def test_long_texts_are_cut_with_a_mark_and_broken_ones_written(tmp_path: Path) -> None:
    info = ExampleInfo("webli", "ocr", "k", "shard", "en", "x" * 1000, "half a pair: \ud83d")
    (example,) = identities([info])
    assert example["input_text"] == "x" * 200 + " … (800 more characters)"
    path = save_bad_batch(tmp_path, 7, "loss is not finite", [example])
    assert json.loads(path.read_text(encoding="utf-8"))["examples"] == [example]


@pytest.mark.parametrize(("bad", "stops"), [([], False), ([6], False), ([5, 6], True), ([2, 3, 4, 5, 6], True)])
def test_a_run_that_ends_in_a_row_of_skipped_steps_is_no_success(bad: list[int], stops: bool, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=f"the last {len(bad)} were skipped in a row") if stops else nullcontext():
        check_end(6, bad, tmp_path)
