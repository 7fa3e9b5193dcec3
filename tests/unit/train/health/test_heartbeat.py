"""Heartbeats cost a shared disk a few files per machine, and every rank has one, whatever its machine is."""

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from train.health import heartbeat
from train.health.heartbeat import Heartbeats, machine_folder, published

RANKS_PER_NODE, NODES = 8, 128


def rank_of(folder: Path, rank: int, machine: Path, world_size: int = 4, local_rank: int | None = None) -> Heartbeats:
    """Return the heartbeats of a rank whose machine is the folder `machine`; it beats when a test calls `beat`."""
    beats = Heartbeats(folder, rank, world_size, machine=machine)
    beats.own.host = machine.name
    beats.is_first_here = (rank if local_rank is None else local_rank) == 0
    return beats


def beat(*ranks: Heartbeats) -> None:
    """Beat once on each rank, and wait until everything is written."""
    for each in ranks:
        each.beat()
        assert each.local_job.wait(10) and each.shared_job.wait(10)


class SharedDisk:
    """Count the operations on a folder; each of them is a request to the metadata server of a shared disk."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()

        def counted(name: str, function):  # type: ignore[no-untyped-def]
            def call(path: Path, *arguments, **options):  # type: ignore[no-untyped-def]
                if Path(path).is_relative_to(folder):
                    self.calls[name] += 1
                return function(path, *arguments, **options)

            return call

        monkeypatch.setattr(heartbeat.os, "replace", counted("rename", os.replace))
        for owner, name in ((Path, "open"), (Path, "mkdir"), (Path, "unlink"), (Path, "glob"), (Path, "lstat")):
            monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))


def test_a_thousand_ranks_cost_the_shared_disk_two_requests_per_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    (run / "heartbeats").mkdir(parents=True)
    machines = [tmp_path / f"n{node}" for node in range(NODES)]
    for machine in machines:
        machine.mkdir()
    ranks = [
        rank_of(run, rank, machines[rank // RANKS_PER_NODE], NODES * RANKS_PER_NODE, rank % RANKS_PER_NODE)
        for rank in range(NODES * RANKS_PER_NODE)
    ]
    for each in ranks:
        each._count()
        each._write_local()
        each.is_published = False  # no file of an earlier process is to be removed
    disk = SharedDisk(run, monkeypatch)
    for each in ranks:
        each._publish()
    assert disk.calls == {"open": NODES, "rename": NODES}  # in 5 s: 51 a second, not 1,000 and more
    assert len(published(run)) == NODES * RANKS_PER_NODE


def test_where_the_lowest_rank_of_a_machine_stops_the_next_one_writes(tmp_path: Path) -> None:
    machine = tmp_path / "n0"
    machine.mkdir()
    first, second = (rank_of(tmp_path, rank, machine) for rank in (0, 1))
    beat(first, second)
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["n0_rank_00000.jsonl"]
    beat(first)  # a tick later it has read the heartbeat of the other one
    assert [published(tmp_path)[rank].beats for rank in (0, 1)] == [2, 1]
    second.fresh_s = 0.0  # the heartbeat of the first one is no longer fresh
    second.is_first_here = True
    beat(second)
    assert published(tmp_path)[1].beats == second.own.beats
    second.fresh_s = 60.0
    beat(second)
    assert len(list((tmp_path / "heartbeats").iterdir())) == 1, "the first one lives"


def test_ranks_that_share_no_memory_each_write_their_own(tmp_path: Path) -> None:
    ranks = [rank_of(tmp_path, rank, tmp_path / f"container{rank}") for rank in range(3)]
    for each in ranks:
        each.machine.mkdir()  # type: ignore[union-attr]
        each.begun = time.monotonic() - each.fresh_s - 1  # long enough for heartbeats of other ranks to appear
    nowhere = Heartbeats(tmp_path, 3, 4)
    nowhere.machine = None
    beat(*ranks, nowhere)
    assert set(published(tmp_path)) == {0, 1, 2, 3}


def test_a_rank_that_ends_writes_its_own_file_and_its_next_process_replaces_it(tmp_path: Path) -> None:
    machine = tmp_path / "n0"
    machine.mkdir()
    first, second = (rank_of(tmp_path, rank, machine) for rank in (0, 1))
    beat(first, second)
    second.own.frame = "train/step/loop.py:9 in step"
    second.write()
    assert first.read()[1].frame == published(tmp_path)[1].frame == "train/step/loop.py:9 in step"
    elsewhere = tmp_path / "n1"
    elsewhere.mkdir()
    again = rank_of(tmp_path, 1, elsewhere, local_rank=0)
    beat(again)
    found = published(tmp_path)[1]
    assert (found.host, found.frame, found.beats) == ("n1", None, 1)


def test_nothing_is_left_in_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "MEMORY", tmp_path)
    run = tmp_path / "run"
    dead = Heartbeats(run, 5, 8)
    dead.own.at = 1.0  # seconds after the machine was started
    dead._write_local()
    first, second = Heartbeats(run, 0, 2), Heartbeats(run, 1, 2)
    beat(first, second)
    assert first.machine is not None and set(first.read_local()) == {0, 1}
    assert first.machine.stat().st_mode & 0o777 == 0o700
    first.close(10)
    second.close(10)
    assert not first.machine.exists()


def test_a_folder_that_other_users_can_enter_or_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, own = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    own.mkdir()
    monkeypatch.setattr(heartbeat, "MEMORY", shared)
    monkeypatch.setattr("tempfile.tempdir", str(own))
    found = machine_folder(tmp_path / "run")
    assert found is not None and found.parent == shared
    for bit in range(6):  # of the group and of others: read, write, enter
        found.chmod(0o700 | 1 << bit)
        assert machine_folder(tmp_path / "run") == own / found.name
    found.rmdir()
    found.symlink_to(tmp_path)
    (own / found.name).chmod(0o755)
    assert machine_folder(tmp_path / "run") is None


def test_lines_that_are_no_heartbeat_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    written = '{"rank": 0}\n{"rank": 1, "x": 2}\n[1]\n{"ra'
    (tmp_path / "heartbeats" / "n0_rank_00000.jsonl").write_text(written, encoding="utf-8")
    assert set(published(tmp_path)) == {0}
