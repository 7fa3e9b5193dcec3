"""A line of metrics holds losses, counts and speeds with their units."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.objectives import NAMES
from model.loss import LossTotals
from tests.unit.train.ranks import group, layout
from train.health.memory import GIB
from train.health.stragglers import RankTimes
from train.step.metrics import StepMetrics, losses
from train.step.reduction import PendingReports, RankReport, RankStats, SkipCauses, StepStats, reduce_stats

OBJECTIVES = ("ocr", "vqa", "vqg")
TOTALS = LossTotals(*torch.tensor([[4.0, 6.0, 0.0], [0.4, 0.2, 0.0], [1.0, 3.0, 0.0], [4.0, 6.0, 0.0]]))
STATS = StepStats(
    num_micro_batches=2, num_targets=10, encoder_tokens=90, images=3, examples={"ocr": 1, "vqa": 2, "vqg": 0},
    data_wait_s=0.25, memory_bytes=3 * GIB, stop=False, save=False, skipped={"webli/broken image": 2}, positions=200,
)  # fmt: skip


def line(peak_tflops: float | None = 100.0) -> dict[str, object]:
    flops: Any = SimpleNamespace(step=lambda examples, images, encoder_tokens, decoder_tokens: 8e12)
    metrics = StepMetrics(flops, world_size=2, peak_tflops=peak_tflops)
    return metrics.line(
        7, LossTotals(*torch.zeros(4, len(NAMES))), STATS, seconds=2.0, learning_rate=0.1, grad_norm=1.5
    )


def test_losses_are_weighted_by_target_tokens() -> None:
    values = losses(TOTALS, OBJECTIVES)
    assert values["loss"] == pytest.approx(1.06)
    assert values["z_loss"] == pytest.approx(0.06)
    assert values["loss/ocr"] == pytest.approx(1.1)
    assert values["accuracy/vqa"] == pytest.approx(0.5)
    assert "loss/vqg" not in values  # no target token: no loss


def test_a_step_without_targets_has_no_loss() -> None:
    values = losses(LossTotals(*torch.zeros(4, 3)), OBJECTIVES, "validation/")
    assert values == {"validation/loss": None, "validation/z_loss": None}


def test_speeds_and_sizes_carry_their_units() -> None:
    values = line()
    assert values["examples_per_s"] == 1.5
    assert values["tokens_per_s"] == 50.0
    assert values["tflops_per_device"] == pytest.approx(2.0)
    assert values["tflop"] == pytest.approx(8.0)
    assert values["mfu"] == pytest.approx(0.02)
    assert values["padding_fraction"] == pytest.approx(0.5)
    assert values["memory_gib"] == 3.0
    assert values["skipped/webli/broken image"] == 2
    assert (values["examples/ocr"], values["examples/vqa"]) == (1, 2)
    assert line(peak_tflops=None)["mfu"] is None


def test_one_process_agrees_with_itself() -> None:
    examples = {"ocr": 1, "vqa": 2, "vqg": 0}
    own = RankStats(3, 10, 90, 3, examples, truncated=2, skipped={"a/b": 1})
    report = RankReport(data_wait_s=0.5, memory_bytes=7, stop=True)
    stats = PendingReports(report, layout()).add_to(reduce_stats(own, SkipCauses(), group()))
    assert stats == StepStats(3, 10, 90, 3, examples, 0.5, 7, True, False, {"a/b": 1}, truncated=2)
    assert stats.times.shape == (0, 3)


def test_times_of_all_ranks_are_sent_in_whole_microseconds() -> None:
    reports = PendingReports(RankReport(times=RankTimes(1.5, 0.25, 0.125)), layout())
    assert reports.add_to(STATS).times.tolist() == [[1.5, 0.25, 0.125]]
