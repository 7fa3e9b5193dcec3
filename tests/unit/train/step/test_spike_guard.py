"""Losses that are not finite or spike are refused; after many of them a run goes back or stops."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import RunStopped
from train.config import GuardConfig
from train.run.skipped_batches import SkippedBatches
from train.step.spike_guard import SkippedSteps, SpikeGuard, check_end

SETTINGS = GuardConfig(spike_factor=3.0, spike_margin=1.0, window=5, max_in_a_row=3)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_from_the_first_step(loss: float) -> None:
    assert SpikeGuard(SETTINGS).verdict(loss) == "loss is not finite"


def test_spikes_are_separated_from_noise_once_the_window_is_full() -> None:
    guard = SpikeGuard(SETTINGS)
    for loss in (9.0, 5.0, 2.0, 2.0, 2.0):
        assert guard.verdict(100.0) is None
        guard.recent.append(loss)
    assert guard.verdict(5.9) is None
    assert guard.verdict(6.1) == "loss spikes to 6.1 (median 2)"


def test_small_losses_may_grow_by_any_factor_up_to_the_margin() -> None:
    guard = SpikeGuard(SETTINGS, recent=[0.1] * 5)
    assert guard.verdict(1.05) is None
    assert guard.verdict(1.15) is not None


def skipped(folder: Path, batches: SkippedBatches | None = None, **saved: Any) -> SkippedSteps:
    return SkippedSteps(SETTINGS, batches or SkippedBatches(), folder, **saved)


def test_bad_steps_in_a_row_only_send_the_run_back(tmp_path: Path) -> None:
    steps = skipped(tmp_path)
    for step in (1, 2):
        steps.skip(step, "loss is not finite")
    steps.accept(1.0)
    for step in (4, 5):
        steps.skip(step, "loss is not finite")
        assert steps.roll_back_to(step) is None
    steps.skip(6, "gradient is not finite")
    assert steps.row == [4, 5, 6]
    with pytest.raises(RunStopped) as stopped:
        steps.roll_back_to(6)
    assert str(stopped.value) == (
        "The run stopped at step 6: 3 steps in a row were skipped (the last because the gradient is not finite); the "
        f"ids of their examples (of the newest 20 steps at most) are in {tmp_path}/bad_batch_step_*.json."
    )


def test_the_run_goes_back_as_often_as_it_may_and_counts_batches_that_are_left(tmp_path: Path) -> None:
    batches = SkippedBatches([2, 3], roll_backs=1)
    steps = SkippedSteps(replace(SETTINGS, roll_back=2), batches, tmp_path)
    for step in (4, 5, 6):
        steps.skip(step, "loss is not finite")
    assert steps.roll_back_to(6) == 3 and steps.row == [6, 7, 8]
    batches.roll_backs = 2
    with pytest.raises(RunStopped, match="stopped at step 6: 3 steps in a row"):
        steps.roll_back_to(6)


def test_a_resumed_process_judges_and_counts_as_the_old_one(tmp_path: Path) -> None:
    steps = skipped(tmp_path)
    for loss in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        steps.accept(loss)
    assert steps.state.keys() == {"guard"}, "no row, no entry"
    steps.skip(7, "loss is not finite")
    state = json.loads(json.dumps(steps.state))
    resumed = skipped(tmp_path, recent=state["guard"], row=state["bad"])
    for loss in (11.9, 12.1):
        assert resumed.guard.verdict(loss) == steps.guard.verdict(loss)
    assert resumed.row == steps.row == [7]


@pytest.mark.parametrize(("bad", "stops"), [([], False), ([6], False), ([5, 6], True), ([2, 3, 4, 5, 6], True)])
def test_a_run_that_ends_in_a_row_of_skipped_steps_is_no_success(bad: list[int], stops: bool, tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match=f"the last {len(bad)} were skipped in a row") if stops else nullcontext():
        check_end(6, bad, tmp_path)
