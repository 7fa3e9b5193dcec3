"""Shards are read at random access as they are; what is broken in them is skipped, counted, and in the end refused."""

import gzip
import io
import json
import os
import re
import tarfile

import pytest

from common.errors import ConfigurationError
from data.config import DataConfig
from data.error_budget import ErrorBudgetExceeded, Ledger, NothingUsable
from data.reading.reader import Reader
from data.shards.files import Handle
from data.shards.sample import entries, read_without_image
from data.shards.scan import BLOCK, OTHER_KIND, TWICE
from data.shards.source import ReadOptions, ShardSource, shard_paths
from data.shards.writer import write_shard
from data.skip import Skip
from data.stream import Stream
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture, png, record


def source(folder, split="train") -> tuple[ShardSource, Ledger]:
    ledger = Ledger(1.0, 1000)
    return ShardSource("webli", str(folder), split, ledger), ledger


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(count: int) -> list:
    return [(f"{number:05d}", {"alt_text": f"text {number}"}, png(number)) for number in range(count)]


@pytest.mark.parametrize("size", [b"z" * 12, bytes(12)])
def test_texts_are_read_up_to_a_header_whose_size_is_damaged(tmp_path, size):
    path = tmp_path / "train-00000.tar"
    write_tar(path, {"a.txt": b"a text", "a.png": bytes(100_000), "a.json": b"{}"})
    content = path.read_bytes()
    at = content.index(b"a.json") + 124
    content = content[:at] + size + content[at + len(size) :]
    found = read_without_image(lambda offset, length: content[offset : offset + length], 0, len(content))
    assert entries(found) == entries(content)
    assert found[:BLOCK] == content[:BLOCK] and b"a text" in found


def test_every_record_is_read_at_random_access(tmp_path):
    write_shard(tmp_path / "train-00000.tar", samples(5))
    write_shard(tmp_path / "train-00001.tar", samples(3))
    write_shard(tmp_path / "train-00002.tar", samples(4))
    opened, ledger = source(tmp_path)
    places = [(shard, within) for shard, count in enumerate((5, 3, 4)) for within in range(count)]
    assert len(opened) == len(places) == 12
    for number in (7, 0, 4, 5, 8, 11):
        shard, within = places[number]
        assert opened[number].key == opened.key(number) == f"{within:05d}"
        assert opened[number].fields == {"alt_text": f"text {within}"} and opened[number].image == png(within)
        assert opened[number].shard == opened.shard(number) == str(tmp_path / f"train-0000{shard}.tar")
    assert not ledger.drain()


def test_facts_are_of_the_shards_not_of_where_they_lie(tmp_path):
    for place in ("here", "there/again"):
        write_shard(tmp_path / place / "train-00000.tar", samples(3))
        write_shard(tmp_path / place / "train-00001.tar", samples(2))
    os.utime(tmp_path / "there/again/train-00001.tar", (1, 1))
    facts = source(tmp_path / "here")[0].facts
    assert (facts.records, facts.shards) == (5, 2)
    assert source(tmp_path / "there/again")[0].facts == facts == source(f"{tmp_path}/here/train-*.tar")[0].facts


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "written anew"])
def test_facts_change_with_the_shards(tmp_path, change):
    paths = [tmp_path / f"train-0000{number}.tar" for number in range(3)]
    for path in paths[:2]:
        write_shard(path, samples(2))
    before = source(tmp_path)[0].facts
    if change == "added":
        write_shard(paths[2], samples(1))
    elif change == "removed":
        paths[1].unlink()
    elif change == "renamed":
        paths[1].rename(paths[2])
    else:
        write_shard(paths[1], [("00000", {"alt_text": "text 0 " * 200}, png(0)), samples(2)[1]])  # larger by blocks
    after = source(tmp_path)[0].facts
    assert after.fingerprint != before.fingerprint
    assert (after.records == before.records) == (change in ("renamed", "written anew"))


def test_a_stream_gives_the_facts_of_its_sources(tmp_path, tokenizer):
    for name in ("cc3m_35l", "webli"):
        write_shard(tmp_path / name / "train-00000.tar", samples(3))
    opened = stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1), ("webli", "ocr", 1))
    assert {name: facts.records for name, facts in opened.facts().items()} == {"cc3m_35l": 3, "webli": 3}


def test_the_same_samples_give_the_same_bytes(tmp_path):
    write_shard(tmp_path / "a.tar", samples(3))
    write_shard(tmp_path / "b.tar", samples(3))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.tar"]


def test_a_shard_that_cannot_be_finished_leaves_nothing_behind(tmp_path):
    write_shard(tmp_path / "a.tar", samples(1))
    before = (tmp_path / "a.tar").read_bytes()
    with pytest.raises(ConfigurationError, match=r"a\.tar would hold the key '00001' twice"):
        write_shard(tmp_path / "a.tar", [*samples(3), *samples(2)[1:]])
    assert os.listdir(tmp_path) == ["a.tar"] and (tmp_path / "a.tar").read_bytes() == before


def test_img2dataset_folders_and_fields(tmp_path):
    meta = json.dumps({"caption": "a dog", "key": "000000000", "status": "success"}).encode()
    members = {"000000000.jpg": png(0), "000000000.json": meta, "000000000.txt": b"a dog"}
    write_tar(tmp_path / "00000.tar", members)
    write_tar(tmp_path / "00001.tar", {"000010000.jpg": png(1), "000010000.txt": b"a cat"})
    opened, _ = source(tmp_path)
    assert [opened[number].fields["alt_text"] for number in range(2)] == ["a dog", "a cat"]
    with pytest.raises(ConfigurationError, match="no validation shards"):
        shard_paths(str(tmp_path), "validation")


def test_patterns_name_shards(tmp_path):
    for name in ("x-train-000.tar", "x-train-001.tar", "x-test-000.tar", "x-train-007.tar"):
        write_shard(tmp_path / name, samples(1))
    assert len(shard_paths(f"{tmp_path}/x-train-*.tar", "train")) == 3
    assert len(shard_paths(f"{tmp_path}/x-train-{{000..001}}.tar", "train")) == 2
    assert len(shard_paths(f"{tmp_path}/x-{{split}}-*.tar", "test")) == 1


@pytest.mark.parametrize("cut_in", ["image", "json", "header", "between", "end"])
def test_a_truncated_tar_gives_its_whole_samples(tmp_path, cut_in):
    path = tmp_path / "train-00000.tar"
    write_shard(path, samples(6))
    with tarfile.open(path) as tar:
        image, text = tar.getmembers()[6:8]  # of the sample 00003
    places = {
        "image": image.offset_data + 10,
        "json": text.offset_data + 3,
        "header": text.offset + 100,
        "between": text.offset,
        "end": text.offset_data + 512,
    }
    os.truncate(path, places[cut_in])
    opened, ledger = source(tmp_path)
    assert len(opened) == (4 if cut_in == "end" else 3)
    assert [opened[number].image for number in range(3)] == [png(number) for number in range(3)]
    assert ledger.drain() == {"webli/truncated tar": 1}


def test_a_tar_that_is_none_at_all_leaves_nothing_to_read(tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ConfigurationError, match="hold no sample"):
        source(tmp_path)
    write_shard(tmp_path / "train-00001.tar", samples(2))
    assert len(source(tmp_path)[0]) == 2


def stream(root, tokenizer, *components, budget=1.0, minimum=1000) -> Stream:
    data = DataConfig(
        root=str(root),
        tokenizer=tokenizer.path,
        global_batch_size=20,
        num_streams=1,
        encoder_length=64,
        decoder_length=32,
        images_per_row=2,
        error_budget=budget,
        error_budget_minimum=minimum,
    )
    return Stream(data, mixture(*components), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)


def spoil(folder, cause: str, bad: int = 2, good: int = 8) -> None:
    """A shard in which `bad` of the records suffer from `cause`."""
    members = {}
    for number in range(bad + good):
        fields, image = json.dumps(record(number)).encode(), png(number)
        if number < bad:
            if cause == "broken JSON":
                fields = fields[:-5]
            elif cause == "unreadable image":
                image = image[:60]
            elif cause == "empty caption":
                fields = json.dumps({"captions": {"en": " "}}).encode()
            elif cause == "malformed captions":
                fields = json.dumps({"captions": ["no", "dictionary"]}).encode()
        members[f"{number:03d}.png"] = image
        if cause == "missing image" and number < bad:
            del members[f"{number:03d}.png"]
        members[f"{number:03d}.json"] = fields
    write_tar(folder / "train-00000.tar", members)


CAUSES = ["broken JSON", "unreadable image", "empty caption", "missing image", "malformed captions"]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_broken_record_is_skipped_counted_and_leaves_a_hole(tmp_path, tokenizer, cause):
    spoil(tmp_path / "cc3m_35l", cause)
    reader = Reader(stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1)), 0, 1, 2)
    found = reader.read(1)  # 20 examples of 10 records: two epochs
    assert sorted(info.key for info in found.infos) == [f"{n:03d}" for n in range(2, 10) for _ in range(2)]
    assert found.skipped == {f"cc3m_35l/{cause}": 4}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_source_over_its_budget_stops_and_names_the_shard(tmp_path, tokenizer, cause):
    spoil(tmp_path / "cc3m_35l", cause)
    reader = Reader(stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1), budget=0.1, minimum=3), 0, 1, 2)
    with pytest.raises(ErrorBudgetExceeded) as error:
        reader.read(1)
    message = str(error.value)
    assert "source cc3m_35l" in message and "cc3m_35l/train-00000.tar" in message
    assert re.search(rf"[45] of \d+ records read are broken \([45] x {cause}\)", message)


def test_few_broken_records_are_forgiven(tmp_path, tokenizer):
    spoil(tmp_path / "cc3m_35l", "broken JSON", bad=1, good=199)
    opened = stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1), budget=0.02, minimum=2)
    assert sum(len(opened.rows(step, range(1))[1]) for step in range(1, 31)) == 597


def test_a_component_that_gives_nothing_ends_reading_and_names_what_it_misses(tmp_path, tokenizer):
    records = [(f"{number}", {"text": "no image here", "u\nrl \ud83d": "x"}, None) for number in range(30)]
    write_shard(tmp_path / "webli" / "train-00000.tar", records)
    opened = stream(tmp_path, tokenizer, ("webli", "captioning", 1), ("webli", "span_corruption", 1))
    with pytest.raises(NothingUsable) as error:
        for step in range(1, 11):
            opened.rows(step, range(1))
    assert "mixture.webli/captioning gives nothing: none of 30 records of source webli" in str(error.value)
    assert "captioning needs the field captions, and they hold text, u\\nrl \\ud83d" in str(error.value)
    assert isinstance(error.value, ErrorBudgetExceeded)
    with pytest.raises(NothingUsable, match="30 x no caption"):
        opened.rows(12, range(1))


def test_a_component_that_gives_little_is_no_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("data.mixture.FIRST_TRIES", 5)
    records = [(f"{number}", {"text": "x"} if number != 77 else record(0), png(0)) for number in range(200)]
    write_shard(tmp_path / "webli" / "train-00000.tar", records)
    opened = stream(tmp_path, tokenizer, ("webli", "captioning", 1))
    infos = [info for step in range(1, 11) for info in opened.rows(step, range(1))[1]]
    assert {info.key for info in infos} == {"77"}
    account = opened.ledger.account("webli")
    assert account.used == len(infos) and account.read - account.used == account.skipped == sum(
        opened.ledger.drain().values()
    )


def test_every_record_that_is_read_is_used_or_skipped_or_broken(tmp_path, tokenizer):
    records = [(f"{number:03d}", record(number), png(number)) for number in range(30)]
    records += [(f"{number:03d}", {"text": "no caption"}, png(number)) for number in range(30, 50)]
    records += [(f"{number:03d}", {"captions": {"en": " "}}, png(number)) for number in range(50, 60)]
    write_shard(tmp_path / "webli" / "train-00000.tar", records)
    opened = stream(tmp_path, tokenizer, ("webli", "captioning", 2), ("webli", "vqa", 1))
    reads = []
    for component in opened.components:
        component.source = Watched(component.source, reads)
    infos = [info for step in range(1, 10) for info in opened.rows(step, range(1))[1]]
    account, counted = opened.ledger.account("webli"), opened.ledger.drain()
    assert account.read == len(reads) == 180 and account.used == len(infos)
    assert account.broken == counted["webli/empty caption"] == sum(counted.values()) == 180 - len(infos) > 0
    assert account.skipped == 0 and not {f"{number:03d}" for number in range(30, 50)} & {info.key for info in infos}


@pytest.mark.parametrize("none", [[], None, [None]])
def test_negatives_are_learned_from_a_source_that_names_none(tmp_path, tokenizer, none):
    """A pure function of the source: any process that reads whichever record first, its examples are the same."""
    records = [(f"{number:02d}", record(number) | {"absent_labels": none}, png(number)) for number in range(12)]
    write_shard(tmp_path / "objects" / "train-00000.tar", records)
    components = [("objects", "detection", 1), ("objects", "object_vqa", 1)]
    first, second = (stream(tmp_path, tokenizer, *components) for _ in range(2))
    infos = first.rows(4, range(1))[1]
    second.rows(1, range(1))
    assert [info.input_text for info in second.rows(4, range(1))[1]] == [info.input_text for info in infos]
    own = {f"{item['label']}" for number in range(12) for item in record(number)["objects"]}
    asked = {label for info in infos for label in re.split(" and ", info.input_text.removeprefix("detect "))
             if info.objective == "detection"}  # fmt: skip
    assert len(asked) > 4 and asked <= own
    assert "No" in {info.target_text for info in infos}


class Watched:
    """A source that writes down which records are read."""

    def __init__(self, source: ShardSource, reads: list[int]) -> None:
        self.source, self.name, self.reads = source, source.name, reads
        self.shard, self.key, self.numbered, self.image = source.shard, source.key, source.numbered, source.image

    def __len__(self) -> int:
        return len(self.source)

    def read(self, number: int, image: bool = True):
        self.reads.append(number)
        return self.source.read(number, image)


def test_a_shard_that_vanishes_is_counted_against_the_budget(tmp_path, tokenizer):
    spoil(tmp_path / "cc3m_35l", "none")
    opened = stream(tmp_path, tokenizer, ("cc3m_35l", "captioning", 1), minimum=3, budget=0.0)
    (tmp_path / "cc3m_35l" / "train-00000.tar").unlink()
    with pytest.raises(ErrorBudgetExceeded, match="unreadable shard"):
        opened.rows(1, range(1))


def test_a_source_without_shards_is_a_configuration_error(tmp_path, tokenizer):
    with pytest.raises(ConfigurationError, match=r"no train shards at .*webli"):
        stream(tmp_path, tokenizer, ("webli", "captioning", 1))


def test_a_broken_tar_among_others_is_one_defect(tmp_path):
    write_shard(tmp_path / "train-00000.tar", samples(2))
    (tmp_path / "train-00001.tar").write_bytes(gzip.compress((tmp_path / "train-00000.tar").read_bytes()))
    (tmp_path / "train-00002.tar").symlink_to(tmp_path / "nowhere.tar")
    opened, ledger = source(tmp_path)
    assert len(opened) == 2
    assert ledger.drain() == {"webli/gzip-compressed tar": 1, "webli/unreadable shard": 1}
    (tmp_path / "train-00000.tar").unlink()
    with pytest.raises(ConfigurationError, match=r"hold no sample \(1 x gzip-compressed tar, 1 x unreadable shard\)"):
        source(tmp_path)


def test_members_that_are_left_out_are_counted_and_the_lost_ones_cost_budget(tmp_path):
    members = {f"{number:03d}.{kind}": b"{}" for number in range(20) for kind in ("png", "jpg", "json", "cls")}
    write_tar(tmp_path / "train-00000.tar", members)
    opened, ledger = source(tmp_path)
    assert (len(opened), opened.members) == (20, 80)
    assert dict(opened.left_out) == {OTHER_KIND: 20, TWICE: 20}
    assert ledger.drain() == {f"webli/{OTHER_KIND}": 20, f"webli/{TWICE}": 20}
    ShardSource("webli", str(tmp_path), "train", Ledger(0.25, 0))
    with pytest.raises(ErrorBudgetExceeded, match=rf"20 of 80 members .* \(20 x {TWICE}\).*train-00000\.tar"):
        ShardSource("webli", str(tmp_path), "train", Ledger(0.2, 16))


def test_a_tar_that_is_there_twice_is_read_once(tmp_path):
    write_shard(tmp_path / "a" / "0.tar", samples(3))
    (tmp_path / "a" / "1.tar").symlink_to("0.tar")
    (tmp_path / "b").symlink_to("a")
    opened, ledger = source(f"{tmp_path}/{{a,b,a}}/*.tar")
    assert (len(opened), opened.paths) == (3, [f"{tmp_path}/a/0.tar"])
    assert ledger.drain() == {"webli/shard that is a link to another one": 3}


def test_an_empty_member_is_not_a_missing_one(tmp_path):
    write_tar(tmp_path / "train-00000.tar", {"a.json": b"{}", "a.png": b"", "b.json": b"{}"})
    opened, _ = source(tmp_path)
    assert [opened[number].image for number in range(2)] == [b"", None]


@pytest.mark.parametrize("kind", ["json", "txt", "png"])
def test_members_are_bounded_before_they_are_read(tmp_path, kind):
    members = {f"a.{kind}": bytes((1 << 20) + 1), "b.png": bytes(1 << 20), "b.json": b"{}"}
    write_tar(tmp_path / "train-00000.tar", members)
    opened = ShardSource("webli", str(tmp_path), "train", Ledger(1.0, 0), ReadOptions(max_member_mib=1))
    with pytest.raises(Skip, match=r"member of more than data\.max_member_mib=1") as skip:
        opened[0]
    assert skip.value.defect and opened[1].image == bytes(1 << 20)


@pytest.mark.parametrize("change", ["other samples", "shorter", "same samples", "touched"])
def test_a_shard_that_changes_meanwhile_is_a_defect_unless_its_members_are_where_they_were(tmp_path, change):
    path = tmp_path / "train-00000.tar"
    write_shard(path, samples(3))
    opened, _ = source(tmp_path)
    if change == "other samples":
        write_shard(path, [(key, fields | {"long": "x" * 2000}, image) for key, fields, image in samples(3)])
    elif change == "shorter":
        os.truncate(path, path.stat().st_size // 2)
    elif change == "same samples":
        write_shard(path, samples(3))
    os.utime(path, (1, 1))
    for number in range(3):
        if change in ("same samples", "touched"):
            assert opened[number].image == png(number)
        else:
            with pytest.raises(Skip, match="changed shard") as skip:
                opened[number]
            assert skip.value.defect


def held_out(folder, split: str, holdout: float = 0.2) -> ShardSource:
    return ShardSource("webli", str(folder), split, Ledger(1.0, 0), ReadOptions(holdout=holdout))


def test_a_share_of_the_records_is_held_out_by_their_keys(tmp_path):
    every = [(f"{number:05d}", {"text": f"text {number}"}, None) for number in range(400)]
    write_shard(tmp_path / "one" / "00000.tar", every)
    for number in range(4):
        write_shard(tmp_path / "four" / f"{number:05d}.tar", every[number::4][::-1])
    keys = {}
    for folder in ("one", "four"):
        training, validation = (held_out(tmp_path / folder, split) for split in ("train", "validation"))
        keys[folder] = {validation[number].key for number in range(len(validation))}
        assert keys[folder] | {training[number].key for number in range(len(training))} == {key for key, *_ in every}
        assert len(training) + len(validation) == 400 and validation.facts.fingerprint != training.facts.fingerprint
    assert keys["one"] == keys["four"] and len(keys["one"]) == 59
    assert sorted(keys["one"])[:3] == ["00022", "00034", "00046"]  # the same on every machine, in every process
    assert {held_out(tmp_path / "one", "validation", 0.1)[number].key for number in range(3)} < keys["one"]
    assert len(held_out(tmp_path / "one", "train", 0.0)) == 400


def test_a_holdout_of_nothing_is_refused(tmp_path):
    write_shard(tmp_path / "00000.tar", samples(3))
    with pytest.raises(
        ConfigurationError, match=r"data\.holdout=0\.001 leaves no validation record of the 3 of source"
    ):
        held_out(tmp_path, "validation", 0.001)


def test_what_is_not_printed_of_reading_is_as_in_the_settings():
    options = ReadOptions()
    assert vars(options) == {name: getattr(DataConfig(), name) for name in vars(options)}


@pytest.mark.parametrize("order", ["jpg json txt", "json jpg txt", "txt json jpg"])
@pytest.mark.parametrize("prefix", ["", "long/" * 30])
def test_texts_are_read_without_the_image(tmp_path, order, prefix, monkeypatch):
    contents = {"jpg": b"j" * 50_000, "json": json.dumps({"alt_text": "x" * 3000}).encode(), "txt": b"caption"}
    write_tar(tmp_path / "train-0.tar", {f"{prefix}{n}.{k}": contents[k] for n in range(2) for k in order.split()})
    source = ShardSource("s", str(tmp_path), "train", Ledger(0.01, 16))
    taken, read = [], Handle.read
    monkeypatch.setattr(Handle, "read", lambda self, at, size: taken.append(size) or read(self, at, size))
    for number in range(2):
        texts = source.read(number, image=False)
        assert sum(taken) < 12_000
        whole = source.read(number)
        assert whole.image == contents["jpg"] and texts == whole._replace(image=b"")
        taken.clear()


@pytest.mark.parametrize("change", ["none", "replaced", "touched"])
def test_an_image_is_read_from_where_its_texts_were_found_while_the_tar_is_the_same(tmp_path, change, monkeypatch):
    members = {"json": b'{"alt_text": "a dog"}', "jpg": b"j" * 50_000}
    write_tar(tmp_path / "train-0.tar", {f"0.{kind}": content for kind, content in members.items()})
    source = ShardSource("s", str(tmp_path), "train", Ledger(0.01, 16))
    at = source.read(0, image=False).image_at
    taken, read = [], Handle.read
    monkeypatch.setattr(Handle, "read", lambda self, at, size: taken.append(size) or read(self, at, size))
    if change == "replaced":  # in place, with other members
        write_tar(tmp_path / "train-0.tar", {f"1{kind}.{kind}": content for kind, content in members.items()})
        with pytest.raises(Skip, match="changed shard"):
            source.image(0, at)
        return
    if change == "touched":
        os.utime(tmp_path / "train-0.tar", (1, 1))
    assert source.image(0, at) == source.image(0) == members["jpg"]
    assert (50_000 in taken) == (change == "none")
