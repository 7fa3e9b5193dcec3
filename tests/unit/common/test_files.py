"""Files that are written in one piece: any process that reads one reads the old text or the new one."""

import errno
import json
import os
from pathlib import Path

import pytest

from common.files import beside, write_bytes, write_text


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_text(path, "é\n", durable=True)
    assert path.read_bytes() == "é\n".encode() and list(tmp_path.iterdir()) == [path]
    write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00"


@pytest.mark.parametrize("name", ["a" * 255, "空" * 85, "😀" * 63])
def test_every_name_that_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    write_bytes(tmp_path / name, b"x")
    assert os.listdir(tmp_path) == [name]


def test_an_error_or_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), beside(path) as partial:
        partial.write_text("half", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old" and partial.suffix != ".json"
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_do_not_write_into_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with beside(path) as first, beside(path) as second:
        assert first != second
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "first"


def test_half_a_surrogate_pair_stays_valid_json(tmp_path: Path) -> None:
    text = "a red circle \ud83d"
    write_text(tmp_path / "a.json", json.dumps(text, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == text


def test_what_resuming_needs_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda file: (order.append("sync"), fsync(file))[1])
    monkeypatch.setattr("os.replace", lambda *names: (order.append("rename"), replace(*names))[1])
    write_text(tmp_path / "a", "x", durable=True)
    write_text(tmp_path / "b", "x")
    assert order == ["sync", "rename", "sync", "rename"]


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_an_error_of_writing_names_the_file(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(f"os.{what}", fails)
    with pytest.raises(OSError, match="Input/output error") as failed:
        write_text(tmp_path / "a.json", "x", durable=True)
    assert failed.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())
