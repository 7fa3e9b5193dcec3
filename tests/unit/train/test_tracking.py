"""wandb, offline and for real."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from train.config import Phase, RunConfig, RunSettings, StageConfig, TrackerConfig
from train.samples import Sample
from train.tracking import NoTracker, WandbTracker, open_tracker

SAMPLE = Sample("vq2a", "vqa", "k1", "en", "What colour?", ["red"], "red", np.zeros((14, 14, 3), np.uint8))
TEXT_SAMPLE = Sample("text", "span_corruption", "k2", "th", "…", ["…"], "…", None)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunConfig:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return RunConfig(
        run=RunSettings(name="tracked"), stage=StageConfig([Phase()]), tracker=TrackerConfig(project="test")
    )


def test_an_offline_run_goes_on_under_its_id_and_logs_no_step_twice(config: RunConfig, tmp_path: Path) -> None:
    first = open_tracker(config, tmp_path, None, rank=0)
    for step in (1, 2, 3):
        first.log({"step": step, "loss": 1.0 / step})
    first.samples(3, [TEXT_SAMPLE, SAMPLE])
    first.close()
    assert first.run_id

    resumed = open_tracker(config, tmp_path, first.run_id, rank=0)
    assert isinstance(resumed, WandbTracker) and resumed.run_id == first.run_id
    sent: list[tuple[int, dict[str, float]]] = []
    finish = resumed.run.finish
    resumed.run = SimpleNamespace(log=lambda line, step: sent.append((step, line)), finish=finish)
    for step in (2, 3, 4):  # the checkpoint was of step 1
        resumed.log({"step": step, "loss": 0.0})
    resumed.close()
    assert sent == [(4, {"loss": 0.0})]

    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(first.run_id) for folder in folders)
    table = json.loads(next((tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")).read_text())
    assert [row[1] for row in table["data"]] == ["vqa", "span_corruption"]


def test_its_failing_warns_once_and_stops_nothing(config: RunConfig, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    tracker = WandbTracker(config, tmp_path, None)
    finish = tracker.run.finish
    tracker.run = SimpleNamespace(log=fails)
    with pytest.warns(RuntimeWarning, match="no route to host") as warned:
        tracker.log({"step": 1, "loss": 1.0})
        tracker.log({"step": 2, "loss": 1.0})
        tracker.samples(2, [SAMPLE])
    assert len(warned) == 1
    tracker.close()
    finish()


def test_other_ranks_and_tracker_none_say_nothing(config: RunConfig, tmp_path: Path) -> None:
    assert isinstance(open_tracker(config, tmp_path, None, rank=1), NoTracker)
    config.tracker.name = "none"
    assert isinstance(open_tracker(config, tmp_path, None, rank=0), NoTracker)
