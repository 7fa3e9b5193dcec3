"""Indices are made before a run by one command, also by ranks together, and are those that the run opens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError, Notice
from data import index
from data.config import DataConfig
from data.error_budget import Ledger
from data.shards import build
from data.shards.source import ShardSource
from data.stream import Stream
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture, png, write_source
from tests.unit.data.shards.test_source import write_tar

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def root(tmp_path) -> Path:
    write_source(tmp_path, "webli")
    write_source(tmp_path, "webli", shards=1, samples=3, split="validation")
    write_source(tmp_path, "text", shards=1, samples=4)
    return tmp_path


def test_a_run_opens_what_the_command_made(root, monkeypatch, capsys):
    index.main([f"root={root}", "processes=1"])
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith("  ")]
    assert [line.partition(" (")[0] for line in heads] == [
        "text train: 4 records in 1 shards",
        "webli train: 24 records in 2 shards",
        "webli validation: 3 records in 1 shards",
    ]
    bytes_each = os.path.getsize(root / "webli" / "train.index") / 24
    assert f"s, {bytes_each:.1f} bytes a record, fingerprint " in heads[1] and "broken" not in heads[1]
    monkeypatch.setattr(build, "examine", lambda *_: pytest.fail("it was indexed"))
    assert len(ShardSource("webli", str(root / "webli"), "train", Ledger(1.0, 0))) == 24
    index.main([f"root={root}", "verify=true"])
    place = root / "webli" / "train.index"
    content = bytearray(place.read_bytes())
    content[64] ^= 1
    place.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"train\.index is damaged \(hashes\); remove it"):
        index.main([f"root={root}", "verify=true"])


def test_an_index_that_cannot_be_kept_takes_no_bytes(root, monkeypatch, capsys):
    usual = os.replace

    def fails(partial: str, place: str) -> None:
        if str(place).endswith(".index") and str(place).startswith(str(root)):
            raise OSError(30, os.strerror(30), place)
        usual(partial, place)

    monkeypatch.setattr(os, "replace", fails)
    (root / "text" / "train-00000.tar").write_bytes((root / "text" / "train-00000.tar").read_bytes()[:2000])
    with pytest.warns(Notice, match="cannot|Read-only"):
        index.main([f"root={root}", "processes=1", "sources={text: text}", "splits=[train]"])
    line, *held = capsys.readouterr().out.splitlines()
    assert not held or f"  {root}/text/train-00000.tar: truncated tar" in held
    assert ", 1 of them broken (" in line and " s, 0.0 bytes a record, fingerprint " in line


@pytest.mark.parametrize("killed", [False, True])
def test_ranks_share_the_tars(root, killed):
    code = (
        "import sys; from data import index; from data.shards import build; "
        "build.build_together.__defaults__ = (1.0,); index.main(sys.argv[1:])"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"root={root}", "processes=1", "sources={webli: webli}", "splits=[train]"],
            cwd=REPOSITORY, stdout=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": "2",
                 "OMPI_COMM_WORLD_LOCAL_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        )
        for rank in range(2)
    ]  # fmt: skip
    if killed:
        ranks[1].kill()
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert printed[0].startswith("webli train: 24 records in 2 shards") and printed[1] == ""
    assert "\n  alt_text: 24 records in 1 language: en 24\n" in printed[0]
    assert ranks[0].returncode == 0 and not (root / "webli" / "train.index.parts").exists()


def test_a_corpus_without_shards_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigurationError, match="no folder of shards in"):
        index.main([f"root={tmp_path}"])
    with pytest.raises(ConfigurationError, match=r"fields\.webli='text_alt' is unknown"):
        index.main([f"root={tmp_path}", "fields={webli: {text_alt: TEXT}}"])


def test_img2dataset_shards_with_a_field_map_and_json_in_strings(tmp_path, tokenizer):
    """As img2dataset writes columns of text, where lists and objects are JSON."""
    members = {}
    for number in range(24):
        columns = {
            "url": "http://x", "key": f"{number:09d}", "status": "success", "caption": None, "width": 20,
            "TEXT": f"ein Bild {number}", "LANGUAGE": "de",
            "meta": json.dumps({"translations": {"en": f"an image {number}", "fr": f"une image {number}"}}),
            "qa": json.dumps([{"question": "wo?", "answer": "here", "language": "de"}]),
            "objects": "no JSON" if number == 3 else "",
        }  # fmt: skip
        members |= {f"{number:09d}.jpg": png(number), f"{number:09d}.json": json.dumps(columns).encode(),
                    f"{number:09d}.txt": b""}  # fmt: skip
    write_tar(tmp_path / "webli" / "00000.tar", members)
    places = {"alt_text": "TEXT", "language": "LANGUAGE", "captions": "meta.translations", "questions": "qa"}
    data = DataConfig(root=str(tmp_path), tokenizer=tokenizer.path, global_batch_size=24, num_streams=4,
                      encoder_length=96, decoder_length=64, images_per_row=3, fields={"webli": places})  # fmt: skip
    asked = mixture(("webli", "split_captioning", 1), ("webli", "captioning", 1), ("webli", "vqa", 1))
    stream = Stream(data, asked, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)
    _, infos = stream.rows(1, range(4))
    assert len(infos) == 24
    for info in infos:
        number = int(info.key)
        whole = f"{info.input_text} {info.target_text}"
        if info.objective == "split_captioning":
            assert info.language == "de" and info.target_text in f"ein Bild {number}" and "in DE at" in whole
        elif info.objective == "captioning":
            assert info.target_text in (f"an image {number}", f"une image {number}")
        else:
            assert info.target_text == "here" and "wo?" in whole
    source = stream.components[0].source
    assert [source.index.profiles[n] for n in source.index.sections["profiles"][[3, 4]]] == [
        "alt_text=de captions=en,fr questions=de objects=! boxes=!", "alt_text=de captions=en,fr questions=de"
    ]  # fmt: skip
    bare = ShardSource("webli", str(tmp_path / "webli"), "train", Ledger(1.0, 0))  # without a map: another index
    assert bare.index.profiles[0] == "" and "TEXT" in bare[0].fields


@pytest.mark.parametrize(
    ("make", "remark"),
    [
        (["webli/00000.tar"], r"holds tars itself, and is a source; set root=.*, and sources=\{webli: webli\} to"),
        (["webli/one/0.jpg"], "it holds the folders one"),
        ([], "there is no such folder"),
    ],
)
def test_a_root_that_is_no_corpus(tmp_path, make, remark):
    for name in make:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigurationError, match=remark):
        index.main([f"root={tmp_path}/webli"])
