"""The official files of tasks become items; mistakes in them are one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigurationError
from data import objectives
from data.objectives.base import AnyOptions
from data.skip import Skip
from data.tasks.config import TaskConfig, TaskPart
from data.tasks.folders import choices
from data.tasks.item import Item
from data.tasks.overlap import seen_in_training, trained_on
from data.tasks.read import encode_item, prompt, read_task
from data.tasks.source import ItemSource
from data.tasks.stream import ItemStream
from data.tokenizer import EOS, Tokenizer

COCO = {
    "images": [{"id": 7, "file_name": "a.png", "domain": "in-domain"}, {"id": 8, "file_name": "b.png"}],
    "annotations": [
        {"image_id": 7, "caption": "a dog"},
        {"image_id": 7, "caption": "one dog"},
        {"image_id": 7, "caption": "bad", "is_rejected": True},
    ],
}
KARPATHY = {
    "images": [
        {"cocoid": 5, "split": split, "filepath": "val2014", "filename": "x.jpg", "sentences": [{"raw": "a cat"}]}
        for split in ("test", "train")
    ]
}
XM3600 = [
    {"image/key": "k", "en": {"caption": ["A dog."], "caption/tokenized": ["a dog"]}, "th": {"caption": ["หมา"]}},
]
QUESTIONS = {"questions": [{"question_id": q, "image_id": 7, "question": f"How many {q}?"} for q in (70, 71)]}
ANNOTATIONS = {
    "annotations": [{"question_id": 70, "answer_type": "number", "answers": [{"answer": "2"}, {"answer": "two"}]}]
}
TEXTVQA = {
    "data": [{"question_id": 1, "image_id": "i", "question": "Sign?", "answers": ["stop"], "ocr": ["STOP", "X"]}]
}
XGQA = {"q1": {"question": "Farbe?", "imageId": 3, "answer": "red"}}
SQUAD = {
    "data": [
        {"paragraphs": [{"context": "A b.", "qas": [{"id": "s", "question": "A?", "answers": [{"text": "b"}] * 2}]}]}
    ]
}
BOXES = {
    "images": [{"id": 1, "file_name": "a.png", "height": 100, "width": 200}],
    "categories": [{"id": 4, "name": "dog"}, {"id": 5, "name": "cat"}],
    "annotations": [{"image_id": 1, "category_id": 4, "bbox": [10, 20, 30, 40]}],
}


def task(folder: Path, contents: Any, format: str, **settings: Any) -> TaskConfig:
    """Write files of a task, and return its settings."""
    files = []
    for number, content in enumerate(contents if isinstance(contents, tuple) else (contents,)):
        lines = format == "xm3600"
        file = folder / f"{number}.json{'l' * lines}"
        file.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
        files.append(str(file))
    return TaskConfig(name="t", format=format, files=files, **settings)


def test_captions(tmp_path: Path) -> None:
    first, second = read_task(task(tmp_path, COCO, "coco_captions"))
    assert first == Item("7", ("a dog", "one dog"), "", "a.png", "7", "en", "in-domain")
    assert second.references == ()
    (one,) = read_task(task(tmp_path, KARPATHY, "karpathy"))
    assert (one.id, one.references, one.image) == ("5", ("a cat",), "val2014/x.jpg")
    english, thai = read_task(task(tmp_path, XM3600, "xm3600"))
    assert english == Item("k/en", ("a dog",), "", "k", "k", "en", "en")
    assert (thai.id, thai.references, thai.language) == ("k/th", ("หมา",), "th")


def test_questions(tmp_path: Path) -> None:
    counted, unanswered = read_task(task(tmp_path, (QUESTIONS, ANNOTATIONS), "vqa_v2"))
    assert counted == Item("70", ("2", "two"), "How many 70?", "7", "7", "en", "number")
    assert unanswered.references == ()
    assert len(read_task(task(tmp_path, QUESTIONS, "vqa_v2"))) == 2
    fields = {"list": "data", "id": "question_id", "text": "question", "image": "image_id", "ocr": "ocr"}
    config = task(tmp_path, TEXTVQA, "rows", fields=fields, prompt="Answer in {language}: {text} {ocr} <extra_id_0>")
    (row,) = read_task(config)
    assert (row.id, row.references, row.ocr) == ("1", ("stop",), ("STOP", "X"))
    assert prompt(config, row) == "Answer in EN: Sign? STOP X <extra_id_0>"
    (row,) = read_task(task(tmp_path, [{"id": 3, "text": "Red?", "answers": 1, "image": "a.png"}], "rows"))
    assert row == Item("3", ("1",), "Red?", "a.png", "a.png", "en", extra=row.extra)
    fields = {"text": "question", "answers": "answer", "image": "imageId"}
    (row,) = read_task(task(tmp_path, XGQA, "rows", fields=fields, language="de"))
    assert (row.id, row.references, row.image, row.language) == ("q1", ("red",), "3", "de")
    (one,) = read_task(task(tmp_path, SQUAD, "squad", prompt="{context} {text}"))
    assert (one.id, one.references, one.extra) == ("s", ("b",), {"context": "A b."})


def test_boxes(tmp_path: Path) -> None:
    (one,) = read_task(task(tmp_path, BOXES, "coco_detection", prompt="detect {text}"))
    assert one.text == "dog and cat" and one.extra["boxes"] == [["dog", 20, 10, 60, 40]]


@pytest.mark.parametrize(
    "contents, format, settings, message",
    [
        ({**COCO, "images": COCO["images"] * 2}, "coco_captions", {}, "two entries with the id 7"),
        ((QUESTIONS, {"annotations": [{"question_id": 9}]}), "vqa_v2", {}, "1 ids of answers in .*such as 9"),
        ((QUESTIONS, {"annotations": [{"question_id": 70}] * 2}), "vqa_v2", {}, "answers to the question 70 twice"),
        ({"questions": [{"question_id": 1, "question": None}]}, "vqa_v2", {}, "no text but null as its question;"),
        ({"questions": None}, "vqa_v2", {}, r"is no file of task\.format=vqa_v2 \(TypeError: 'NoneType' object is not"),
        (
            {**COCO, "images": COCO["images"][1:]},
            "coco_captions",
            {},
            "1 ids of captions in .* of the images of .*as 7",
        ),
        ([{"id": 1}, {"id": 1}], "rows", {}, "two entries with the id 1"),
        ([{"id": 1, "answers": [{}]}], "rows", {}, "has no answer but nothing; check task.format"),
        ([[1], 2], "rows", {}, r"is no file of task\.format=rows \(AttributeError"),
        (COCO, "vqa_v2", {}, "has no questions but images, annotations; check task.format"),
        ({"images": []}, "coco_captions", {}, "holds no entry to evaluate"),
        (QUESTIONS, "vqa_v2", {"prompt": "{txt}"}, r"task.prompt has \{txt\}, which the items lack"),
        (COCO, "coco_captions", {"images": "nowhere"}, "task.images=nowhere has none of the task's images"),
        ((COCO, COCO), "coco_captions", {}, "names 2 files"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, contents: Any, format: str, settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_task(task(tmp_path, contents, format, **settings))


def test_files_that_are_missing_or_no_json(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    for name, reason in (("x.json", "is no JSON"), ("y.json", "No such file")):
        with pytest.raises(ConfigurationError, match=reason):
            read_task(TaskConfig(format="squad", files=[str(tmp_path / name)]))
    with pytest.raises(ConfigurationError, match="names no file"):
        read_task(TaskConfig())
    with pytest.raises(ConfigurationError, match="is no template"):
        TaskConfig(prompt="{text")


def test_rows_fit_the_longest_prompt_and_cut_ones_are_counted(tokenizer: Tokenizer) -> None:
    items = [Item("1", (), "a dog"), Item("2", (), "word " * 2000)]
    config = TaskConfig(prompt="{text}")
    short, long = ItemStream(config, items[:1], tokenizer, 4, 9), ItemStream(config, items, tokenizer, 4, 9)
    assert (short.cut, long.cut) == (0, 1)
    assert short.shape.encoder_length == 16 and long.shape.encoder_length == 1024
    seen = ItemStream(TaskConfig(prompt="{text}", images="."), items[:1], tokenizer, 4, 9)
    assert seen.shape.encoder_length > 9 and seen.components[0].held_out(0, 0) is None
    assert seen.components[0].skipped == {"missing image": 1}


def test_an_item_becomes_an_example(tmp_path: Path, tokenizer: Tokenizer) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    config = task(tmp_path, COCO, "coco_captions", images=str(tmp_path), prompt="Generate in {language} <extra_id_0>")
    first, second = read_task(config)
    example = encode_item(config, first, tokenizer, 4, 3)
    assert example.images.shape == (1, 4, 4, 3) and example.images[0, 0, 0].tolist() == [255, 0, 0]
    assert example.encoder_ids[-1] == EOS and example.info.references == ("a dog", "one dog")
    assert (example.info.id, example.info.index, example.info.input_text) == ("7", 3, "Generate in EN <extra_id_0>")
    assert np.array_equal(example.decoder_ids, [EOS])
    with pytest.raises(Skip, match="missing image"):
        encode_item(config, second, tokenizer, 4, 4)


MAXM = {
    "dataset": "maxm_v1_release", "split": "fr",
    "annotations": [{"image_id": "im", "image_url": "u", "qa_pairs": [
        {"question_id": "q", "question": "Combien ?", "answers": ["2", "deux"], "processed_answers": ["2"],
         "is_collection": False}]}],
}  # fmt: skip


def test_maxm_is_answered_in_the_language_of_the_question(tmp_path: Path) -> None:
    config = task(tmp_path, MAXM, "maxm", prompt="Answer in {language}: {text} <extra_id_0>")
    (item,) = read_task(config)
    assert (item.id, item.references, item.image, item.language) == ("q", ("2", "deux"), "im", "fr")
    assert prompt(config, item) == "Answer in FR: Combien ? <extra_id_0>"


def test_a_prompt_spells_languages_as_the_paper_does() -> None:
    config = TaskConfig(name="t", format="rows", files=["x"], prompt="{language}: {text} <extra_id_0>")
    named = {"he": "IW", "iw": "IW", "no": "NO", "EN": "EN", "not a code": "NOT A CODE"}
    assert {code: prompt(config, Item("1", (), text="a", language=code)).split(":")[0] for code in named} == named


def test_ocr_strings_are_read_from_top_left_to_bottom_right(tmp_path: Path) -> None:
    def word(text: str, left: float, top: float) -> dict[str, Any]:
        return {"word": text, "bounding_box": {"top_left_x": left, "top_left_y": top, "width": 0.1, "height": 0.1}}

    words = [word("below", 0.1, 0.5), word("right", 0.6, 0.11), word("left", 0.1, 0.1)]
    rosetta = {"data": [{"image_id": "i", "ocr_tokens": ["x"], "ocr_info": words}]}
    (tmp_path / "ocr.json").write_text(json.dumps(rosetta), encoding="utf-8")
    fields = {"list": "data", "id": "question_id", "text": "question", "image": "image_id", "answers": "answers"}
    words_of = {"fields": fields, "ocr": [str(tmp_path / "ocr.json")], "prompt": "{text} {ocr} <extra_id_0>"}
    config = task(tmp_path, TEXTVQA, "rows", **words_of)
    assert prompt(config, read_task(config)[0]) == "Sign? left right below <extra_id_0>"
    (tmp_path / "ocr.json").write_text(json.dumps([{"image": "j", "ocr": ["y"]}]), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"^task\.ocr: .* names none of the task's images \(such as i\)"):
        read_task(config)


def test_folders_of_classes(tmp_path: Path) -> None:
    """Named by number (V2), by WordNet id (ImageNet), or by a mapping to several classes (ObjectNet)."""
    for folder in ("0", "n2", "lamp", "spoon"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / folder / "a.png")
    classes = {"0": ["n1", "tench"], "1": ["n2", "table_lamp"], "2": ["n3", "lampshade"]}
    config = task(tmp_path, (classes, {"0": "0", "n2": "n2", "lamp": ["n2", "n3"]}), "image_folder")
    config = replace(config, root=str(tmp_path), images="images")
    assert {item.id: item.references for item in read_task(config)} == {
        "0/a.png": ("tench",), "n2/a.png": ("table lamp",), "lamp/a.png": ("table lamp", "lampshade"),
    }  # fmt: skip
    assert choices(config) == ["tench", "table lamp", "lampshade"]
    with pytest.raises(ConfigurationError, match=r"the folder .*lamp is no class of .*; name the file of its classes"):
        read_task(replace(config, files=config.files[:1]))


def test_a_part_of_a_task_trains_on_its_references(tmp_path: Path) -> None:
    """Items of a mixture: targets are references, prompts the task's; one without references teaches nothing."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "7.png")
    config = task(tmp_path, (QUESTIONS, ANNOTATIONS), "vqa_v2", prompt="Answer in EN: {text} <extra_id_0>")
    config = replace(config, root=str(tmp_path), images="images", image_name="{image_id}.png")
    config = replace(config, name="v", train=TaskPart(files=config.files), limit=1)
    source = ItemSource("v", config, "train", 0.0)
    assert len(source) == 1 and source.key(0) == "70" and source.facts.records == 1
    record, asked = source.read(0), objectives.load("task")
    made = {
        asked.make(record.fields, np.random.default_rng(seed), AnyOptions(), None).target_text  # type: ignore
        for seed in range(20)
    }
    assert made == {"2", "two"} and record.image is not None
    assert record.fields["prompt"] == "Answer in EN: How many 70? <extra_id_0>" and record.fields["closed"]
    other = ItemSource("v", replace(config, prompt="{text}"), "train", 0.0)
    assert other.facts.fingerprint != source.facts.fingerprint  # another prompt is another run
    same = ItemSource("v", config, "train", 0.0)
    assert same.facts == source.facts
    renamed = {"annotations": [{**ANNOTATIONS["annotations"][0], "answers": [{"answer": "3"}, {"answer": "two"}]}]}
    (tmp_path / "changed.json").write_text(json.dumps(renamed), encoding="utf-8")
    files = [config.files[0], str(tmp_path / "changed.json")]
    changed = ItemSource("v", replace(config, files=files, train=TaskPart(files=files)), "train", 0.0)
    assert len(changed) == 1 and changed.facts.fingerprint != source.facts.fingerprint  # so is another answer
    assert seen_in_training(config, source.items, [config]) == ["70"]
    assert trained_on(config, "validation", source.items) == ["70"]
    part = TaskPart(files=config.files, images="copies")
    assert trained_on(replace(config, validation=part), "validation", source.items) == []
