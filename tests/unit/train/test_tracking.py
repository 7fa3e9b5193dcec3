"""wandb, offline and for real."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from wandb.proto.wandb_internal_pb2 import Record

from errors import Notice
from train import tracking
from train.config import Phase, RunConfig, RunSettings, StageConfig, TrackerConfig
from train.samples import Sample
from train.tracking import NoTracker, WandbTracker, open_tracker

SAMPLE = Sample("vq2a", "vqa", "k1", "en", "What colour?", ["red"], "red", np.zeros((14, 14, 3), np.uint8))
FACTS = {"git": {"commit": "abc123", "dirty": True}, "layout": {"world": 8}}
TEXT_SAMPLE = Sample("text", "span_corruption", "k2", "th", "…", ["…"], "…", None)


def records(folder: Path) -> list[Record]:
    """What an offline run that has ended wrote; its service may still be writing the last of it."""
    end = time.monotonic() + 60
    while True:
        found = list(parse(folder))
        if "exit" in [record.WhichOneof("record_type") for record in found] or time.monotonic() > end:
            return found
        time.sleep(0.1)


def parse(folder: Path) -> Iterator[Record]:
    """A run's file as `wandb sync` reads it: LevelDB's log format after a header of 7 bytes."""
    content = next(folder.glob("*.wandb")).read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        if position + 7 + size > len(content):
            return
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder: Path) -> list[dict[str, object]]:
    """The lines that were logged, by key."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


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

    first_folder = next((tmp_path / "wandb").glob("offline-run-*"))
    first_folder = first_folder.rename(first_folder.with_name(f"offline-run-1-{first.run_id}"))  # two in one second

    resumed = open_tracker(config, tmp_path, None, rank=0)  # it died before its first checkpoint
    assert isinstance(resumed, WandbTracker) and resumed.run_id == first.run_id
    for step in (2, 3, 4):  # steps that are run again are equal, and known
        resumed.log({"step": step, "loss": 0.0})
        resumed.samples(step, [SAMPLE])
    resumed.close()

    second_folder = next(each for each in (tmp_path / "wandb").glob("offline-run-*") if each != first_folder)
    assert second_folder.name.endswith(first.run_id)
    before, after = ([(line["_step"], line["loss"]) for line in history(f)] for f in (first_folder, second_folder))
    assert before == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))] and after == [(4, 0.0)]
    table = json.loads(next(first_folder.glob("files/media/table/*.json")).read_text(encoding="utf-8"))
    assert [row[1] for row in table["data"]] == ["vqa", "span_corruption"]


def test_what_the_run_was_made_with_its_stages_and_alerts_are_kept(config: RunConfig, tmp_path: Path) -> None:
    config.tracker.group, config.tracker.tags = "sweep", ["mini"]
    tracker = open_tracker(config, tmp_path, None, rank=0, facts=FACTS)
    tracker.stages([[0, "patches", "bridge", 6, 1.5, 0.1, 2.0], [1, "encoder_block_0", "head", 9, 2.5, 0.1, 3.0]])
    tracker.log({"step": 1, "loss": 1.0})
    tracker.alert("straggler", "Rank 3 is slow.")
    tracker.close()
    kept = records(next((tmp_path / "wandb").glob("offline-run-*")))
    run = next(record.run for record in kept if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, list(run.tags)) == ("test", "sweep", ["mini"])
    assert run.notes == "commit abc123 with changes that are not committed"
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["git"] == FACTS["git"] and settings["layout"] == {"world": 8} and settings["run"]["steps"] == 1000
    assert [(r.alert.title, r.alert.text) for r in kept if r.WhichOneof("record_type") == "alert"] == [
        ("straggler", "Rank 3 is slow.")
    ]
    table = json.loads(
        next((tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json")).read_text(encoding="utf-8")
    )
    assert table["columns"][:2] == ["stage", "first unit"] and table["data"][1][1] == "encoder_block_0"
    assert len(history(next((tmp_path / "wandb").glob("offline-run-*")))) == 1  # the table is no step


def test_a_server_that_cannot_be_reached_leaves_an_offline_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2.0)
    with pytest.warns(Notice, match="send it later with `wandb sync`"):
        tracker = open_tracker(config, tmp_path, None, rank=0)
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    assert [line["_step"] for line in history(next((tmp_path / "wandb").glob("offline-run-*")))] == [1]


def test_its_failing_warns_once_and_stops_nothing(config: RunConfig, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    tracker = WandbTracker(config, tmp_path, None, {})
    finish = tracker.run.finish
    tracker.run = SimpleNamespace(log=fails)
    with pytest.warns(Notice, match="no route to host") as warned:
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
