"""The main rank writes what a run reports to every sink; other ranks write nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from train.config import RunConfig, RunSettings
from train.run.records import Records


@pytest.mark.parametrize("rank", [0, 1])
def test_an_alert_reaches_display_and_tracker_on_the_main_rank_alone(rank: int, tmp_path: Path) -> None:
    records: Any = Records(RunConfig(run=RunSettings(name="x", folder=str(tmp_path))), rank)
    shown: list[str] = []
    sent: list[tuple[str, str]] = []
    records.display = SimpleNamespace(note=shown.append)
    records.tracker = SimpleNamespace(alert=lambda title, text: sent.append((title, text)))
    records.alert("straggler", "Rank 3 is slow.")
    assert shown == ["Rank 3 is slow."] * (rank == 0)
    assert sent == [("straggler", "Rank 3 is slow.")] * (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_metrics_reach_file_and_tracker_on_the_main_rank_alone(rank: int, tmp_path: Path) -> None:
    config = RunConfig(run=RunSettings(name="x", folder=str(tmp_path)))
    config.tracker.name = "none"
    records: Any = Records(config, rank)
    lines: list[dict[str, float]] = []
    assert records.begin(0, None, lambda: {}) == (rank == 0)
    records.display = SimpleNamespace(step=lambda line: None, close=lambda: None)
    records.tracker = SimpleNamespace(log=lines.append, close=lambda: None)
    records.record({"step": 1, "loss": 0.5})
    records.close()
    assert lines == [{"step": 1, "loss": 0.5}] * (rank == 0)
    assert (tmp_path / "metrics.jsonl").exists() == (rank == 0)
