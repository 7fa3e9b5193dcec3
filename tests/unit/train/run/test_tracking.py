"""A run is tracked by wandb itself, offline."""

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from wandb.proto.wandb_internal_pb2 import Record

from common.errors import Notice
from evaluation.sample_sheet import Sample
from train.config import RunConfig, RunSettings, TrackerConfig
from train.run import tracking
from train.run.tracking import Tracker, WandbTracker, forget_identities, open_tracker, original_folder

SAMPLE = Sample("vq2a", "vqa", "k1", "en", "What color?", ["red"], "red", np.zeros((14, 14, 3), np.uint8))
FACTS = {"git": {"commit": "abc123", "dirty": True}, "layout": {"world": 8}}
TEXT_SAMPLE = Sample("text", "span_corruption", "k2", "th", "…", ["…"], "…", None)


def records(folder: Path) -> list[Record]:
    """Read the records of an offline run that has ended; wait for its service to write the last ones."""
    end = time.monotonic() + 60
    while True:
        found = list(parse(folder))
        if "exit" in [record.WhichOneof("record_type") for record in found] or time.monotonic() > end:
            return found
        time.sleep(0.1)


def parse(folder: Path) -> Iterator[Record]:
    """Parse a run's file as `wandb sync` does: LevelDB's log format after a header of 7 bytes."""
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
    """Return the lines that were logged, by key."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunConfig:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return RunConfig(run=RunSettings(name="tracked"), tracker=TrackerConfig(project="test"))


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
    for step in (2, 3, 4):  # steps 2 and 3 run again, with equal values
        resumed.log({"step": step, "loss": 0.0})
        resumed.samples(step, [SAMPLE])
    resumed.close()

    second_folder = next(each for each in (tmp_path / "wandb").glob("offline-run-*") if each != first_folder)
    assert second_folder.name.endswith(first.run_id)
    before, after = ([(line["_step"], line["loss"]) for line in history(f)] for f in (first_folder, second_folder))
    assert before == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))] and after == [(4, 0.0)]
    table = json.loads(next(first_folder.glob("files/media/table/*.json")).read_text(encoding="utf-8"))
    assert [row[1] for row in table["data"]] == ["vqa", "span_corruption"]


def test_variables_of_the_environment_join_no_two_runs(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `forget_identities`, wandb reads them in every run that starts in the same shell."""
    monkeypatch.delenv("WANDB_DATA_DIR")
    ids, names = [], []
    for folder in ("a", "b"):  # two runs of one name, each with its own run.folder
        for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_NAME"):
            monkeypatch.setenv(name, "same")
        monkeypatch.setenv("WANDB_RESUME", "must")
        (tmp_path / folder).mkdir()
        with pytest.warns(Notice, match="WANDB_RUN_ID, WANDB_RUN_NAME, WANDB_NAME, WANDB_RESUME from the environment"):
            tracker = open_tracker(config, tmp_path / folder, None, rank=0)
        assert os.environ["WANDB_DATA_DIR"] == str(tmp_path / folder / "wandb")
        tracker.log({"step": 1, "loss": 1.0})
        tracker.close()
        run = next(
            r.run for r in records(next((tmp_path / folder / "wandb").glob("offline-run-*"))) if r.HasField("run")
        )
        ids.append(run.run_id)
        names.append(run.display_name)
        assert tracker.run_id == run.run_id
    assert len({*ids, "same"}) == 3 and names == ["tracked", "tracked"]


def test_an_agents_run_keeps_the_agents_id(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}
    assert forget_identities(agents) == [] and agents["WANDB_RUN_ID"] == "r"
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.MULTIRUN))
    assert forget_identities(agents) == ["WANDB_RUN_ID", "WANDB_SWEEP_ID"] and agents == {}


def test_a_copy_of_a_run_is_another_run_and_a_renamed_one_the_same(tmp_path: Path) -> None:
    home = tmp_path / "a" / "wandb"
    home.mkdir(parents=True)
    (home / "run_id").write_text("x1", encoding="utf-8")
    assert original_folder(home) is None  # a run of an earlier version, which wrote no such file
    (home / "folder").write_text(str(tmp_path / "a"), encoding="utf-8")
    assert original_folder(home) is None
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert original_folder(tmp_path / "b" / "wandb") == str(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert original_folder(tmp_path / "link" / "wandb") is None
    (tmp_path / "b" / "wandb" / "run_id").write_text("x2", encoding="utf-8")  # it has an id of its own now
    assert original_folder(tmp_path / "b" / "wandb") is None
    (tmp_path / "a").rename(tmp_path / "c")
    assert original_folder(tmp_path / "c" / "wandb") is None


def test_facts_stages_and_alerts_of_a_run_are_kept(config: RunConfig, tmp_path: Path) -> None:
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
    assert len(history(next((tmp_path / "wandb").glob("offline-run-*")))) == 1  # the table does not count as a step


def test_a_server_that_cannot_be_reached_leaves_an_offline_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 2.0)
    with pytest.warns(Notice, match="send it later with `wandb sync`"):
        tracker = open_tracker(config, tmp_path, "resumed1", rank=0)
    assert tracker.run_id == "resumed1"
    tracker.log({"step": 1, "loss": 1.0})
    tracker.close()
    assert [line["_step"] for line in history(next((tmp_path / "wandb").glob("offline-run-*")))] == [1]


def test_a_failure_of_wandb_warns_once_and_stops_nothing(config: RunConfig, tmp_path: Path) -> None:
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


def test_other_ranks_and_tracker_none_send_nothing(config: RunConfig, tmp_path: Path) -> None:
    assert type(open_tracker(config, tmp_path, None, rank=1)) is Tracker
    config.tracker.name = "none"
    assert type(open_tracker(config, tmp_path, None, rank=0)) is Tracker
