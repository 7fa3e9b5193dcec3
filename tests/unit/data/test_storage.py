"""A disk that fails for a moment is waited for; one that keeps failing ends the run, and is no bad data."""

import builtins
import errno
import os
import shutil

import pytest

from common import progress
from common.errors import ConfigurationError, StorageFailed
from data import storage
from data.config import DataConfig
from data.error_budget import Ledger
from data.reading.reader import Reader
from data.shards import build
from data.shards.source import ReadOptions, ShardSource
from data.shards.writer import write_shard
from data.skip import Skip
from data.storage import read_file, retry
from tests.unit.data.conftest import png, record
from tests.unit.data.shards.test_source import stream


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The waits, which take no time."""
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        assert seconds > 0, "a wait of nothing may go on forever"
        waits.append(seconds)

    monkeypatch.setattr(storage.time, "monotonic", lambda: sum(waits))
    monkeypatch.setattr(storage.time, "sleep", sleep)
    return waits


class Disk:
    """`open` and `os.stat` fail below a folder as long as `failures` lasts."""

    def __init__(self, monkeypatch, folder, code: int):
        self.failures, self.code = 0, code
        for place, name in ((builtins, "open"), (os, "stat")):
            monkeypatch.setattr(place, name, self.failing(getattr(place, name), str(folder)))

    def failing(self, call, folder):
        def either(path, *arguments, **how):
            if self.failures and str(path).startswith(folder):
                self.failures -= 1
                raise OSError(self.code, os.strerror(self.code), path)
            return call(path, *arguments, **how)

        return either


def opened(folder, number: int = 4, **options) -> ShardSource:
    write_shard(folder / "train-00000.tar", [(f"{i:05d}", record(i), png(i)) for i in range(number)])
    write_shard(folder / "train-00001.tar", [("other", record(9), png(9))])
    return ShardSource("webli", str(folder), "train", Ledger(1.0, 1000), ReadOptions(**options))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.ENOTCONN, errno.EMFILE])
def test_a_moment_is_waited_for(tmp_path, monkeypatch, clock, code):
    places: list[str] = []
    source = opened(tmp_path, retry_s=60.0)
    monkeypatch.setattr(progress, "listeners", [places.append])
    disk = Disk(monkeypatch, tmp_path, code)
    disk.failures = 5
    assert source[2].image == png(2)
    assert len(clock) == 5 and 0 < sum(clock) < 60
    assert places == [f"waiting for {tmp_path}/train-00000.tar"] * 5


def test_waits_grow_to_a_limit_and_end_in_time(tmp_path, clock):
    def read() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(StorageFailed, match=r"x\.tar could not be read for 60 s \(Input/output error, EIO\); start"):
        retry(read, "/data/x.tar", 60.0)
    assert sum(clock) == pytest.approx(60.0)
    assert max(clock) <= storage.LONGEST_WAIT_S and clock[0] <= storage.FIRST_WAIT_S < clock[5]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_keeps_failing_ends_reading_and_opening(tmp_path, monkeypatch, clock, tokenizer, code):
    write_shard(tmp_path / "cc3m_35l" / "train-00000.tar", [(f"{i:05d}", record(i), png(i)) for i in range(8)])
    reader = Reader(stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1), budget=0.0, minimum=0), 0, 1, 2)
    disk = Disk(monkeypatch, tmp_path, code)
    disk.failures = 10**9
    with pytest.raises(StorageFailed, match=r"cc3m_35l/train-00000\.tar .*start the same command again"):
        reader.read(1)
    with pytest.raises(StorageFailed, match=r"cc3m_35l"):
        ShardSource("webli", str(tmp_path / "cc3m_35l"), "train", Ledger(0.0, 0))


def test_an_error_of_a_real_file_system_is_one_of_storage(tmp_path):
    (tmp_path / "train-00000.tar").symlink_to("/proc/self/mem")  # it can be opened, and no process has a first page
    with pytest.raises(
        StorageFailed, match=r"train-00000\.tar could not be read for 0\.2 s \(Input/output error, EIO\)"
    ):
        ShardSource("webli", str(tmp_path), "train", Ledger(1.0, 0), ReadOptions(retry_s=0.2))


def test_a_mount_that_is_lost_is_no_bad_data_and_a_shard_that_is_removed_is(tmp_path, clock):
    folder = tmp_path / "mount"
    source = opened(folder, retry_s=1.0, index_folder=str(tmp_path / "indices"))
    os.rename(folder / "train-00000.tar", tmp_path / "away.tar")
    with pytest.raises(Skip, match="unreadable shard"):
        source[0]
    assert clock == [] and source[4].key == "other"
    os.unlink(folder / "train-00001.tar")  # an empty folder is what a mount leaves behind
    with pytest.raises(StorageFailed, match="ENOENT"):
        source[0]
    shutil.rmtree(folder)
    with pytest.raises(StorageFailed, match="ENOENT"):
        source[1]
    assert source[4].key == "other"  # its tar was opened before
    assert sum(clock) == pytest.approx(1.0)


def test_a_mount_that_comes_back_is_read_on(tmp_path, monkeypatch, clock):
    source = opened(tmp_path / "mount")
    os.rename(tmp_path / "mount", tmp_path / "away")
    monkeypatch.setattr(
        storage.time, "sleep", lambda wait: clock.append(wait) or os.rename(tmp_path / "away", tmp_path / "mount")
    )
    assert source[0].image == png(0) and len(clock) == 1


def test_files_that_may_not_be_read_are_the_users_mistake_at_the_start_only(tmp_path, monkeypatch, clock):
    source = opened(tmp_path)
    disk = Disk(monkeypatch, tmp_path, errno.EACCES)
    disk.failures = 10**9
    with pytest.raises(ConfigurationError, match="may not be read"):
        ShardSource("webli", str(tmp_path), "train", Ledger(1.0, 0))
    with pytest.raises(StorageFailed, match="EACCES"):  # on every rank, and a new start has a sentence for it
        source[0]
    assert clock == []


def test_an_index_that_cannot_be_read_is_waited_for(tmp_path, monkeypatch, clock):
    opened(tmp_path)
    disk = Disk(monkeypatch, tmp_path / "train.index", errno.ETIMEDOUT)
    disk.failures = 3
    scans: list[str] = []
    monkeypatch.setattr(build, "examine", scans.append)
    assert len(ShardSource("webli", str(tmp_path), "train", Ledger(1.0, 0))) == 5
    assert scans == [] and len(clock) == 3


def test_opening_beats_whether_the_index_is_there_or_made(tmp_path, monkeypatch):
    places: list[str] = []
    monkeypatch.setattr(progress, "listeners", [places.append])
    opened(tmp_path)
    opening = f"comparing 2 shards with {tmp_path}/train.index"
    shards = [f"indexing {tmp_path}/train-0000{number}.tar" for number in range(2)]
    assert list(filter(None, places)) == [opening, *shards, f"writing {tmp_path}/train.index"]
    places.clear()
    ShardSource("webli", str(tmp_path), "train", Ledger(1.0, 0))
    assert places == [opening]


def test_any_file_is_read_with_patience(tmp_path, monkeypatch, clock):
    (tmp_path / "model").write_bytes(b"pieces")
    disk = Disk(monkeypatch, tmp_path, errno.EIO)
    disk.failures = 2
    assert read_file(str(tmp_path / "model")) == b"pieces" and len(clock) == 2
    with pytest.raises(FileNotFoundError):
        read_file(str(tmp_path / "none"))


def test_a_disk_that_is_lost_is_not_waited_for_again_until_it_is_back(tmp_path, monkeypatch, clock):
    (tmp_path / "a").touch()
    disk = Disk(monkeypatch, tmp_path, errno.EIO)
    disk.failures = 10**9
    for _ in range(3):  # the records that threads were to read still
        with pytest.raises(StorageFailed):
            read_file(str(tmp_path / "a"), 10.0)
    assert sum(clock) == pytest.approx(10.0)
    disk.failures = 0
    assert read_file(str(tmp_path / "a")) == b""
    disk.failures = 2
    assert read_file(str(tmp_path / "a")) == b"" and sum(clock) > 10.0


@pytest.mark.parametrize("retry_s", [-1.0, float("nan"), float("inf")])
def test_patience_is_a_time(retry_s):
    config = DataConfig("", "", global_batch_size=1, num_streams=1, encoder_length=9, decoder_length=9, retry_s=retry_s)
    with pytest.raises(ConfigurationError, match=r"data\.retry_s="):
        config.check()
