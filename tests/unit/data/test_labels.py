"""A list of labels takes the tokenizer's place: texts become the ids of the labels in them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigurationError, ReadingStopped
from data import objectives
from data.config import ComponentConfig, DataConfig
from data.labels import COORDINATES, FIRST, Labels, main, open_tokenizer
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.objectives.base import Example
from data.shards.writer import write_shard
from data.stream import Stream
from data.tokenizer import EOS, Tokenizer
from model import classifier


def make(record: dict[str, Any], labels: Labels, **options: Any) -> Example:
    module = objectives.load("labels")
    return module.make(record, np.random.default_rng(0), objectives.options("labels", options), labels)


@pytest.fixture
def labels(tmp_path: Path) -> Labels:
    (tmp_path / "labels.txt").write_text("Hund\nred\nred circle\n犬\n7\n", encoding="utf-8")
    found = open_tokenizer(tmp_path / "labels.txt")
    assert isinstance(found, Labels)
    return found


def test_the_longest_label_is_found_whatever_its_case(labels: Labels) -> None:
    names = lambda text: [labels.names[i - FIRST] for i in labels.encode(text)]  # noqa: E731
    assert names("A RED Circle, a red hund; ＲＥＤ cats") == ["red circle", "red", "Hund", "red"]
    assert names("redcircle hunde") == [] and names("犬 and 犬") == ["犬", "犬"]
    assert labels.encode_input("red", closed=False) == []


def test_numbers_are_coordinates_unless_they_are_labels(labels: Labels) -> None:
    ids = labels.encode("12 7 999 1000 red")
    assert ids == [FIRST + 5 + 12, FIRST + 4, FIRST + 5 + 999, FIRST + 1]
    assert labels.decode([*ids, EOS, FIRST]) == "12 7 999 red"
    assert max(ids) < labels.vocab_size


def test_the_classifier_reads_the_same_ids() -> None:
    assert (classifier.FIRST, classifier.COORDINATES) == (FIRST, COORDINATES)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no label; write one a line."),
        ("a dog\nA  dog!\n", "label 1, 'A  dog!', is 'a dog' again; remove or reword it."),
        ("dog\n--\n", "label 1, '--', has no word"),
    ],
)
def test_a_list_that_is_none(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "labels.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        Labels(tmp_path / "labels.txt")
    with pytest.raises(ConfigurationError, match="is no readable list of labels"):
        Labels(tmp_path / "gone.txt")


def test_labels_of_a_record(labels: Labels) -> None:
    record = {"captions": {"en": "a red", "de": "circle, Hund"}, "objects": [{"label": "red circle"}], "ocr": []}
    example = make(record, labels, fields=["captions", "objects", "ocr"])
    assert {*objectives.load("labels").read(example.target_text)} == {"a red", "circle, Hund", "red circle"}
    assert sorted(example.target_ids or ()) == [FIRST, FIRST + 1, FIRST + 2], "no label is of two texts"
    with pytest.raises(ConfigurationError, match="fields has 'classes'; choose from objects, captions"):
        make(record, labels, fields=["classes"])


def test_labels_with_boxes_are_those_of_objects_and_signs(labels: Labels) -> None:
    box = [0.1, 0.2, 0.5, 0.75]
    signs = [{"text": "Hund", "language": "de", "box": box}, {"text": "red", "language": "en"}]
    record = {"objects": [{"label": "red circle", "box": box}, {"label": "red"}], "ocr": signs}
    example = make(record, labels, fields=["objects", "ocr"], boxes=True)
    texts = objectives.load("labels").read(example.target_text)
    assert {*texts} == {"100 200 500 750 red circle", "100 200 500 750 Hund"}
    assert list(example.target_ids or ()) == [id for text in texts for id in labels.encode(text)]
    with pytest.raises(ConfigurationError, match="fields has 'captions', which has no boxes; choose from objects, ocr"):
        make(record, labels, fields=["captions"], boxes=True)


def test_collected_and_read_as_rows(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(MiniatureConfig(folder=str(tmp_path), scale=0.002, languages=["en"], workers=1))
    main([f"root={tmp_path}"])
    found = Labels(tmp_path / "labels.txt")
    assert 4 < len(found.names) < 30 and "circle" in found.names and str(len(found.names)) in capsys.readouterr().out
    main([f"root={tmp_path}", "words=false", f"output={tmp_path}/classes.txt", "most=3"])
    assert all(" " in name for name in Labels(tmp_path / "classes.txt").names)
    main([f"root={tmp_path}", "source=webli", "texts=alt_text,ocr", f"output={tmp_path}/both.txt"])
    main([f"root={tmp_path}", "source=webli", "texts=ocr", f"output={tmp_path}/signs.txt"])
    both, signs = ({*Labels(tmp_path / f"{name}.txt").names} for name in ("both", "signs"))
    assert signs < both and "circle" in both - signs
    with pytest.raises(ConfigurationError, match="texts='classes' is unknown; choose objects"):
        main([f"root={tmp_path}", "texts=classes"])
    (tmp_path / "rare.txt").write_text(found.names[0], encoding="utf-8")
    data = DataConfig(str(tmp_path), "", global_batch_size=64, num_streams=1, encoder_length=20, decoder_length=16)
    rows = {}
    for kind in ("labels", "detection"):
        mixture = {kind: ComponentConfig("objects", kind, 1.0)}
        stream = Stream(data, mixture, Labels(tmp_path / "rare.txt"), 28, 4, "train", 0)
        rows[kind] = stream.rows(1, range(1))[1]
        skipped = stream.ledger.drain()
    assert len(rows["labels"]) < len(rows["detection"]) == 64, "an image without a label is skipped"
    assert not skipped


def test_a_source_of_broken_records_gives_no_labels(tmp_path: Path) -> None:
    shard = tmp_path / "objects" / "train-00000.tar"
    records = [{"objects": [{"label": "cat"}]}] * 4 + [{"objects": [{"label": 7}]}] * 17
    write_shard(shard, [(f"k{n}", record, None) for n, record in enumerate(records)])
    with pytest.raises(ReadingStopped, match=r"source objects is over its error budget: 17 of .*most are in shard"):
        main([f"root={tmp_path}"])
