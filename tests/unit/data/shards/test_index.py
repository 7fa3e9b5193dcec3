"""One index of a source is small, mapped, continued where it was killed, and made anew where a tar changed."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigurationError, Notice
from data.error_budget import Ledger
from data.shards import build
from data.shards.build import Job, build_share, open_index
from data.shards.contents import num_items, profile
from data.shards.examine import examine
from data.shards.index import BLOCK, NoIndex, SourceIndex, write_index
from data.shards.source import ReadOptions, ShardSource
from data.shards.writer import write_shard
from tests.unit.data.conftest import png, record
from tests.unit.data.shards.test_scan import Member, pair, write

REPOSITORY = Path(__file__).parents[4]


def samples(first: int, number: int) -> list:
    return [(f"{n:05d}", record(n), png(n)) for n in range(first, first + number)]


@pytest.fixture
def folder(tmp_path) -> Path:
    for shard in range(3):
        write_shard(tmp_path / f"train-{shard}.tar", samples(10 * shard, 4))
    return tmp_path


def job(folder: Path, target: str = "train.index") -> Job:
    return Job(str(folder), sorted(path.name for path in folder.glob("*.tar")), str(folder / target), retry_s=1.0)


def source(folder: Path, **options) -> ShardSource:
    return ShardSource("webli", str(folder), "train", Ledger(1.0, 1000), ReadOptions(**options))


def keys(opened: ShardSource) -> list[str]:
    return [opened[number].key for number in range(len(opened))]


@pytest.fixture
def examined(monkeypatch) -> list[str]:
    """The tars that are examined."""
    seen: list[str] = []

    def examine_and_note(path: str, *rest):
        seen.append(os.path.basename(path))
        return examine(path, *rest)

    monkeypatch.setattr(build, "examine", examine_and_note)
    return seen


def test_a_tar_is_examined_once_and_again_when_it_changes(folder, examined):
    assert len(source(folder)) == 12 and sorted(examined) == [f"train-{n}.tar" for n in range(3)]
    assert sorted(os.listdir(folder)) == [*(f"train-{n}.tar" for n in range(3)), "train.index"]
    examined.clear()
    first = source(folder)
    assert examined == [] and keys(first) == [
        f"{n:05d}" for shard in range(3) for n in range(10 * shard, 10 * shard + 4)
    ]
    write_shard(folder / "train-1.tar", samples(50, 2))
    changed = source(folder)
    assert examined == ["train-1.tar"] and keys(changed)[4:6] == ["00050", "00051"] and len(changed) == 10
    assert changed.facts.fingerprint != first.facts.fingerprint
    examined.clear()
    (folder / "train-0.tar").unlink()
    write_shard(folder / "train-3.tar", samples(70, 1))
    assert keys(source(folder)) == ["00050", "00051", "00020", "00021", "00022", "00023", "00070"]
    assert examined == ["train-3.tar"]
    os.utime(folder / "train-2.tar", (1, 1))
    assert source(folder).facts == source(folder).facts and examined == ["train-3.tar", "train-2.tar"]


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "header", "version", "old", "folder"])
def test_an_index_that_is_not_right_is_made_anew(folder, examined, kind):
    place = folder / "train.index"
    made = keys(source(folder))
    whole = place.read_bytes()
    examined.clear()
    if kind == "folder":
        place.unlink()
        place.mkdir()
    else:
        spoiled = {
            "empty": b"",
            "text": b"no index",
            "cut": whole[:-100],
            "header": whole[:-50] + b"\1" + whole[-49:],
            "version": whole[:16] + b"\1" + whole[17:],
            "old": b"PK\x03\x04" + bytes(200),
        }
        place.write_bytes(spoiled[kind])
    if kind == "folder":
        with pytest.warns(Notice, match="cannot be kept"):
            assert keys(source(folder)) == made
    else:
        assert keys(source(folder)) == made and place.read_bytes() == whole and len(examined) == 3


def test_damage_of_the_columns_is_found_by_their_checksums_and_when_they_are_read(folder):
    source(folder)
    place = folder / "train.index"
    content = bytearray(place.read_bytes())
    index = SourceIndex(str(place))
    assert index.verify() == []
    at = index.header["sections"]["begins"]["place"]
    content[at : at + 4] = np.uint32(1).tobytes()
    place.write_bytes(content)
    assert SourceIndex(str(place)).verify() == ["begins"]
    opened = source(folder)
    with pytest.raises(Exception, match="changed shard"):
        opened[0]
    assert opened[1].key == "00001"


def test_checksums_are_those_of_zlib(folder):
    """An index is read by later versions."""
    kept = SourceIndex(open_index(job(folder)).path)
    own = {name: zlib.crc32(section.tobytes()) for name, section in kept.sections.items()}
    assert own == {name: one["crc"] for name, one in kept.header["sections"].items()} and len(own) > 5


def test_a_record_takes_24_bytes_of_disk_at_most(tmp_path):
    number, one = 40_000, None
    write_shard(tmp_path / "train-0.tar", samples(0, 10))
    source(tmp_path)
    one = SourceIndex(str(tmp_path / "train.index")).columns(0)
    many = replace(one, **{name: np.resize(getattr(one, name), (number, *getattr(one, name).shape[1:])) for name in
                           ("hashes", "profiles", "image_sizes", "begins", "lengths")})  # fmt: skip
    write_index(str(tmp_path / "many.index"), [f"train-{n}.tar" for n in range(4)], [lambda: many] * 4, {})
    assert len(SourceIndex(str(tmp_path / "many.index"))) == 4 * number
    assert (tmp_path / "many.index").stat().st_size / (4 * number) < 24


def members_anywhere() -> list[Member]:
    apart = [pair("far")[0], *pair("00"), *pair("01"), pair("far")[1]]
    link = tarfile.TarInfo("linked.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "00.jpg"
    extra: list[Member] = [("02.cls", b"3"), *pair("02"), ("02.seg.png", b"mask")]
    long: list[Member] = [*pair("d" * 150 + "/" + "x" * 120), *pair("空\n"), *pair("dots.1.v2")]
    text: list[Member] = [("03.txt", b"a text"), ("03.json", b"{}")]
    return [*apart, *extra, (link, b""), ("linked.json", b"{}"), *long, *text]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_whatever_a_tar_looks_like_its_samples_are_read_as_they_were_found(tmp_path, form):
    path = write(tmp_path / "train-0.tar", *members_anywhere(), form=form)
    opened, content = source(tmp_path), path.read_bytes()
    found = build.examine.__globals__["scan_file"](io.BytesIO(content), (len(content), 0))
    assert len(opened) == len(found.keys) == 9
    for number, spans in enumerate(found.spans.tolist()):
        record = opened[number]
        assert record.key == found.keys[number] == opened.key(number)
        offset, size = spans[2]
        assert record.image == (content[offset : offset + size] if size >= 0 else None)
        if record.key not in ("linked", "03"):
            assert record.fields == {"alt_text": record.key.encode().decode("unicode_escape") if "\\" in record.key
                                     else record.key} or "\\" in record.key  # fmt: skip
    assert opened[8].fields == {"alt_text": "a text"}
    assert 0 < len(opened.index.scattered) < 9


def test_a_build_that_is_killed_is_continued(folder, examined):
    one = job(folder)
    one.parts.mkdir()
    build_share(one, 0, 3)
    assert examined == ["train-0.tar"]
    part = next(one.parts.glob("*.npz"))
    (one.parts / ".x.partial").write_bytes(b"half")
    assert len(open_index(one)) == 12 and sorted(examined) == [f"train-{n}.tar" for n in range(3)]
    assert not one.parts.exists()
    examined.clear()
    (folder / "train.index").unlink()
    one.parts.mkdir()
    build_share(one, 0, 3)
    part.write_bytes(part.read_bytes()[:-100])
    assert len(open_index(one)) == 12 and examined.count("train-0.tar") == 2


def test_processes_share_the_tars_and_the_rest_is_done_by_their_parent(folder, examined, monkeypatch):
    alone = SourceIndex(open_index(job(folder, "alone.index")).path)
    examined.clear()
    start = subprocess.Popen

    def first_is_killed(*arguments, **options):
        process = start(*arguments, **options)
        if arguments[0][-2] == "0":
            process.send_signal(signal.SIGKILL)
        return process

    monkeypatch.setattr(subprocess, "Popen", first_is_killed)
    together = open_index(job(folder), num_processes=2)
    assert set(examined) <= {"train-0.tar", "train-2.tar"} and len(examined) >= 1
    assert together.fingerprint == alone.fingerprint and len(together) == 12
    assert (folder / "train.index").read_bytes() == (folder / "alone.index").read_bytes()


@pytest.mark.parametrize("number", [1, 2])
def test_a_rank_examines_its_share_in_as_many_processes_as_it_is_given(folder, examined, monkeypatch, number):
    start, shares = subprocess.Popen, []

    def noted(arguments, **options):
        shares.append(arguments[-2:])
        return start(arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    one = job(folder)
    build.build_together(one, rank=1, size=2, num_processes=number)
    assert shares == ([] if number == 1 else [["1", "4"], ["3", "4"]])  # every fourth tar each
    assert examined == (["train-1.tar"] if number == 1 else [])
    assert build.num_parts(one) == 1
    assert len(open_index(one)) == 12 and sorted(examined) == sorted({"train-0.tar", "train-2.tar", *examined})


def test_of_two_that_build_at_once_one_waits(folder, examined, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()

    def slow(path: str, *rest):
        inside.set()
        assert go_on.wait(200)
        return examine(path, *rest)

    monkeypatch.setattr(build, "examine", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(open_index(job(folder)))) for _ in range(2)]
    threads[0].start()
    assert inside.wait(200)
    threads[1].start()
    monkeypatch.setattr(build, "examine", lambda *_: pytest.fail("both examine"))
    time.sleep(0.3)
    assert found == []
    monkeypatch.setattr(build, "examine", examine)
    go_on.set()
    for thread in threads:
        thread.join(200)
    assert len(found) == 2 and found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize("code", [28, 30])
def test_an_index_that_cannot_be_kept_is_made_for_this_run(folder, monkeypatch, code):
    usual = os.replace

    def fails(partial: str, place: str) -> None:
        if str(place).startswith(str(folder)):
            raise OSError(code, os.strerror(code), place)
        usual(partial, place)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.warns(Notice, match=rf"{os.strerror(code)}.*data\.index_folder") as seen:
        assert len(source(folder)) == 12
    assert len(seen) == 1
    assert not [name for name in os.listdir(folder) if not name.endswith(".tar")]


def test_an_index_folder_holds_one_file_a_source(folder):
    kept = folder / "kept" / "here"
    for _ in range(2):
        assert len(source(folder, index_folder=str(kept))) == 12
    assert len(os.listdir(kept)) == 1 and not (folder / "train.index").exists()
    with pytest.raises(ConfigurationError, match=r"data\.index_folder=.* cannot be made"):
        source(folder, index_folder=str(folder / "train-0.tar" / "folder"))


def test_an_index_of_nothing_is_no_index(tmp_path):
    with pytest.raises(NoIndex, match="it is no index"):
        (tmp_path / "x").write_bytes(bytes(64))
        SourceIndex(str(tmp_path / "x"))


PROFILES = [
    ({}, ""),
    ({"alt_text": "a dog", "language": "he_IL"}, "alt_text=iw-il"),
    ({"captions": {"en": "a", "de": ["b", "c"], "fr": None}}, "captions=de,en"),
    ({"captions": ["a list"]}, "captions=!"),
    ({"captions": {"en": " "}}, "captions=!"),
    ({"questions": [{"question": "q", "answer": "a"}] * 3 + [{"question": "q", "language": "fr"}]}, "questions=en:3"),
    ({"ocr": [{"text": "a", "language": "ru"}, {"text": "b"}, {"text": "c"}]}, "ocr=en,ru"),
    ({"objects": [{"label": "dog"}]}, "objects=*"),
    ({"objects": [{"label": "dog", "box": [0, 0, 1, 1]}], "text": "x y"}, "objects=* boxes=* text=en"),
    ({"objects": [{"label": "dog", "box": [0, 0, 1, 9]}]}, "objects=* boxes=!"),
]


@pytest.mark.parametrize(("fields", "expected"), PROFILES)
def test_a_profile_names_what_a_record_holds(fields, expected):
    assert profile(fields) == expected


def test_items_follow_from_a_profile():
    found = "captions=de,en questions=en:3,fr ocr=! objects=*"
    items = {name: num_items(found, name, lambda code: code != "de") for name in
             ("captioning", "vqa", "ocr", "object_vqa", "detection", "span_corruption")}  # fmt: skip
    assert items == {"captioning": 1, "vqa": 4, "ocr": 1, "object_vqa": 1, "detection": 0, "span_corruption": 0}
    assert num_items(found, "vqa", lambda code: code == "xx") == 0 and num_items("!", "vqa", lambda code: False) == 1


def test_the_objectives_choose_from_the_records_that_they_can_use(tmp_path):
    number = 2 * BLOCK + 100
    every: list = [(f"{n:05d}", {"text": "t u v"}, None) for n in range(number)]
    for n in range(0, number, 3):
        every[n] = (f"{n:05d}", {"captions": {"de" if n % 5 else "en": "x", "fr": "y"}}, None)
    write_shard(tmp_path / "train-0.tar", every)
    opened = source(tmp_path)
    captioned = [n for n in range(number) if n % 3 == 0]
    found = opened.usable("captioning", None, False)
    assert [found[k] for k in range(len(found))] == [(n, 0) for n in captioned]
    items = opened.usable("captioning", None, True)
    assert [items[k] for k in range(len(items))] == [(n, item) for n in captioned for item in range(2)]
    english = opened.usable("captioning", lambda code: code == "en", True)
    assert [english[k][0] for k in range(len(english))] == [n for n in captioned if n % 5 == 0]
    assert len(opened.usable("ocr", None, False)) == 0
    with pytest.raises(IndexError):
        found[len(found)]
    held = [source(tmp_path, holdout=0.2), ShardSource("webli", str(tmp_path), "validation", Ledger(1.0, 0),
                                                       ReadOptions(holdout=0.2))]  # fmt: skip
    parts = [one.usable("captioning", None, False) for one in held]
    assert sorted(part[k][0] for part in parts for k in range(len(part))) == captioned
    assert 0 < len(parts[1]) < len(parts[0])


def test_the_command_that_makes_indices_needs_no_model(folder):
    code = "import sys, data.shards.build; print([m for m in ('torch', 'grain', 'deepspeed') if m in sys.modules])"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
