"""Converters: a file by hand in exactly each official format gives records with ids, all answers and references."""

import bz2
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from data import fields
from data.corpus.config import BuildConfig, InputConfig
from data.corpus.inputs.open import open_input
from data.corpus.row import Part, Row
from data.skip import Skip
from tests.unit.data.corpus.conftest import jpeg, photo


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(photo(1)))


def read(folder: Path, form: str, **settings: Any) -> list[Row]:
    """Read an input as a build does: part by part."""
    reader = open_input("own", InputConfig(path=str(folder), format=form, **settings), BuildConfig(part_rows=2))
    assert all(file.exists() for file in reader.files())
    return [row for part in reader.parts() for row in reader.rows(part, Counter())]


def test_karpathy_coco(tmp_path: Path) -> None:
    sentences = [
        {"tokens": ["a", "man"], "raw": raw, "imgid": 0, "sentid": n} for n, raw in enumerate(("A man.", "One man."))
    ]
    one = {"filepath": "val2014", "sentids": [0, 1], "filename": "COCO_val2014_000000391895.jpg", "imgid": 0,
           "split": "train", "sentences": sentences, "cocoid": 391895}  # fmt: skip
    write(tmp_path / "dataset_coco.json", {"images": [one, {**one, "split": "test", "cocoid": 2}], "dataset": "coco"})
    image(tmp_path / "images/val2014/COCO_val2014_000000391895.jpg")
    (row,) = read(tmp_path, "coco", task={"split": "train"})
    assert (row.id, row.fields) == ("391895", {"captions": {"en": ["A man.", "One man."]}})
    assert row.image() == jpeg(photo(1))


def test_vqav2_and_okvqa_keep_all_ten_answers(tmp_path: Path) -> None:
    questions = [{"image_id": 458752, "question": "What is it?", "question_id": 458752000},
                 {"image_id": 458752, "question": "Is it red?", "question_id": 458752001}]  # fmt: skip
    answers = [{"answer": f"a{n % 3}", "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
    annotations = [
        {"question_type": "what is", "multiple_choice_answer": "a0", "answers": answers, "image_id": 458752,
         "answer_type": "other", "question_id": 458752000 + n} for n in range(2)
    ]  # fmt: skip
    write(tmp_path / "q.json", {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "questions": questions})
    write(tmp_path / "a.json", {"info": {}, "annotations": annotations})
    for form in ("vqav2", "okvqa"):
        image(tmp_path / "images/COCO_train2014_000000458752.jpg")
        name = "COCO_train2014_{image_id:0>12}.jpg"
        (row,) = read(tmp_path, form, files=["q.json", "a.json"], image_name=name)
        assert row.id == "458752" and [one["id"] for one in row.fields["questions"]] == ["458752000", "458752001"]
        assert row.fields["questions"][0]["answer"] == [f"a{n % 3}" for n in range(10)]
        assert row.fields["questions"][1]["group"] == "other" and row.image()
        assert len(fields.questions(row.fields, lambda code: code == "en")) == 2


def test_textvqa_with_ocr_in_reading_order(tmp_path: Path) -> None:
    rows = [{"question": "what brand?", "image_id": "0054c", "image_classes": ["Belt"], "flickr_original_url": "u",
             "image_width": 1024, "image_height": 664, "answers": ["nous les"] * 10, "question_id": 0}]  # fmt: skip
    boxes = {"EXIT": (0.6, 0.1), "NO": (0.1, 0.5), "SMOKING": (0.55, 0.51)}
    info = [
        {"word": word, "bounding_box": {"top_left_x": x, "top_left_y": y, "width": 0.2, "height": 0.1, "yaw": 0.0}}
        for word, (x, y) in boxes.items()
    ]
    write(tmp_path / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": rows})
    write(tmp_path / "ocr.json", {"data": [{"image_id": "0054c", "ocr_tokens": list(boxes), "ocr_info": info}]})
    image(tmp_path / "train_images/0054c.jpg")
    (row,) = read(tmp_path, "textvqa", files=["TextVQA_0.5.1_train.json"], ocr="ocr.json")
    assert row.fields["questions"] == [
        {"id": "0", "language": "en", "question": "what brand?", "answer": ["nous les"] * 10}
    ]
    assert [one["text"] for one in row.fields["ocr"]] == ["EXIT", "NO", "SMOKING"]
    assert row.fields["ocr"][1]["box"] == [0.5, 0.1, 0.6, pytest.approx(0.3)] and row.image()


def test_vizwiz_stvqa_and_tallyqa(tmp_path: Path) -> None:
    answers = [{"answer_confidence": "yes", "answer": "basil"}, {"answer_confidence": "maybe", "answer": "leaves"}]
    vizwiz = {"image": "VizWiz_train_0.jpg", "question": "What is this?", "answers": answers, "answer_type": "other",
              "answerable": 1}  # fmt: skip
    write(tmp_path / "train.json", [vizwiz])
    (row,) = read(tmp_path, "vizwiz_vqa", files=["train.json"])
    assert row.fields["questions"][0]["answer"] == ["basil", "leaves"] and row.id == "VizWiz_train_0.jpg"
    stvqa = {"question": "Which street?", "image": "coco-text", "file_path": "coco-text/COCO_1.jpg",
             "file_name": "COCO_1.jpg", "answers": ["main"], "question_id": 7, "question_tokens": [],
             "set_name": "train", "dataset": "coco-text"}  # fmt: skip
    write(tmp_path / "train_task_3.json", {"task": "task3", "data": [stvqa]})
    (row,) = read(tmp_path, "stvqa", files=["train_task_3.json"])
    assert row.id == "coco-text/COCO_1.jpg" and row.fields["questions"][0]["id"] == "7"
    with pytest.raises(Skip, match="missing image file"):
        row.image()
    tally = {"answer": 2, "data_source": "imported_genome", "question": "How many cats?", "image": "VG_100K/3.jpg",
             "image_id": 3, "question_id": 30001, "issimple": True}  # fmt: skip
    write(tmp_path / "tally.json", [tally])
    (row,) = read(tmp_path, "tallyqa", files=["tally.json"])
    assert row.fields["questions"] == [
        {"id": "30001", "language": "en", "question": "How many cats?", "answer": ["2"], "group": "True"}
    ]


def test_textcaps_nocaps_xm3600_and_xgqa(tmp_path: Path) -> None:
    caps = [{"image_id": "a1", "image_path": "train/a1.jpg", "caption_str": text, "reference_strs": ["One.", "Two."]}
            for text in ("One.", "Two.")]  # fmt: skip
    write(tmp_path / "caps.json", {"dataset_name": "textcaps", "data": caps})
    (row,) = read(tmp_path, "textcaps", files=["caps.json"])
    assert (row.id, row.fields) == ("a1", {"captions": {"en": ["One.", "Two."]}})
    images = [
        {"id": 0, "open_images_id": "0013ea", "file_name": "0013ea.jpg", "domain": "in-domain", "height": 3, "width": 4}
    ]
    write(
        tmp_path / "nocaps.json",
        {"images": images, "annotations": [{"image_id": 0, "id": n, "caption": f"c{n}"} for n in range(10)]},
    )
    (row,) = read(tmp_path, "nocaps", files=["nocaps.json"], split="validation")
    assert row.fields == {"captions": {"en": [f"c{n}" for n in range(10)]}, "group": "in-domain"}
    line = {"image/key": "00ff", "de": {"caption": ["Ein Hund.", "Hund."], "caption/tokenized": ["ein hund", "hund"]}}
    write(tmp_path / "captions.jsonl", json.dumps(line | {"quz": {"caption": ["Alqo."]}}) + "\n")
    (row,) = read(tmp_path, "xm3600")
    assert row.fields["captions"] == {"de": ["ein hund", "hund"], "quz": ["Alqo."]}
    write(
        tmp_path / "xgqa.json",
        {"201640614": {"imageId": "n578", "question": "Ist es rot?", "answer": "no", "types": {}}},
    )
    (row,) = read(tmp_path, "xgqa", files=["xgqa.json"], language="de")
    assert row.fields["questions"] == [
        {"id": "201640614", "language": "de", "question": "Ist es rot?", "answer": ["no"]}
    ]


def test_coco_35l_and_maxm(tmp_path: Path) -> None:
    lines = [
        {"image_id": f"391895_{n}", "caption_tokenized": f"a man {n}", "translation_tokenized": f"{code} {n}",
         "trg_lang": code,
         "backtranslation_tokenized": "x"} for n in range(2) for code in ("de", "iw")
    ]  # fmt: skip
    (tmp_path / "coco_mt_train.jsonl.bz2").write_bytes(bz2.compress("\n".join(map(json.dumps, lines)).encode()))
    image(tmp_path / "images/COCO_train2014_000000391895.jpg")
    (row,) = read(tmp_path, "coco_35l", files=["coco_mt_train.jsonl.bz2"])
    assert row.fields["captions"] == {"en": ["a man 0", "a man 1"], "de": ["de 0", "de 1"], "iw": ["iw 0", "iw 1"]}
    assert row.id == "391895" and row.image()
    karpathy = {"images": [{"cocoid": 391895, "filepath": "val2014", "filename": "other.jpg"}]}
    write(tmp_path / "dataset_coco.json", karpathy)
    image(tmp_path / "images/val2014/other.jpg")
    (row,) = read(tmp_path, "coco_35l", files=["coco_mt_train.jsonl.bz2", "dataset_coco.json"])
    assert row.image()
    pair = {"question_id": "7_fr", "question": "Qui ?", "answers": ["un chien", "chien"], "processed_answers": [],
            "is_collection": False}  # fmt: skip
    content = {"dataset": "maxm", "version": "1", "split": "fr", "annotations": [
        {"image_id": "00ff", "image_url": "u", "qa_pairs": [pair]}]}  # fmt: skip
    write(tmp_path / "maxm_v1_fr.json", content)
    (row,) = read(tmp_path, "maxm", files=["maxm_v1_fr.json"])
    assert row.fields["questions"] == [
        {"id": "7_fr", "language": "fr", "question": "Qui ?", "answer": ["un chien", "chien"]}
    ]


def test_cc3m_and_cc12m_have_no_header(tmp_path: Path) -> None:
    write(tmp_path / "cc3m/Train_GCC-training.tsv", 'a very "typical" bus station\thttp://l.net/a.jpg\n')
    image(tmp_path / "cc3m/images/000000000.jpg")
    (row,) = read(tmp_path / "cc3m", "cc3m", images="images", image_name="{row:0>9}.jpg")
    assert row.fields == {"alt_text": 'a very "typical" bus station', "url": "http://l.net/a.jpg"} and row.image()
    write(tmp_path / "cc12m/cc12m.tsv", "https://b.net/b.jpg\tPERSON in a park\n")
    (row,) = read(tmp_path / "cc12m", "cc12m")
    assert row.fields["alt_text"] == "PERSON in a park" and row.image() is None


def test_open_images_joins_boxes_labels_and_names(tmp_path: Path) -> None:
    write(tmp_path / "class-descriptions-boxable.csv", '/m/01g317,Person\n/m/0bt9lr,Dog\n/m/04dr76w,"Cat, big"\n')
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    header += "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
    boxes = "000a,xclick,/m/0bt9lr,1,0.1,0.5,0.2,0.6,0,0,0,0,0\n000a,xclick,/m/01g317,1,0,1,0,1,0,0,1,0,0\n"
    write(tmp_path / "train-annotations-bbox.csv", header + boxes)
    labels = "000a,verification,/m/04dr76w,0\n000a,verification,/m/0bt9lr,1\n000b,machine,/m/01g317,0.3\n"
    write(tmp_path / "train-labels.csv", "ImageID,Source,LabelName,Confidence\n" + labels)
    first, second = read(tmp_path, "open_images")
    assert first.id == "000a" and first.fields == {
        "objects": [{"label": "Dog", "box": [0.2, 0.1, 0.6, 0.5]}], "absent_labels": ["Cat, big"],
    }  # fmt: skip
    assert second.fields == {"objects": []}
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/01g317,Person\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="which no file of descriptions has"):
        read(tmp_path, "open_images")


def test_visual_genome_and_objects365(tmp_path: Path) -> None:
    one = {
        "object_id": 1,
        "x": 40,
        "y": 10,
        "w": 80,
        "h": 60,
        "names": ["clock"],
        "synsets": ["clock.n.01"],
        "merged_object_ids": [],
    }
    write(tmp_path / "objects.json", [{"image_id": 1, "objects": [one], "image_url": "u"}])
    write(tmp_path / "image_data.json", [{"image_id": 1, "width": 100, "height": 100, "url": "u", "coco_id": None}])
    qas = [
        {"a_objects": [], "question": "What color?", "image_id": 1, "qa_id": 986, "answer": "Green.", "q_objects": []}
    ]
    write(tmp_path / "question_answers.json", [{"id": 1, "qas": qas}])
    (row,) = read(tmp_path, "visual_genome", files=["objects.json", "image_data.json", "question_answers.json"])
    assert row.fields["objects"] == [{"label": "clock", "box": [0.1, 0.4, 0.7, 1.0]}]
    assert row.fields["questions"] == [{"id": "986", "language": "en", "question": "What color?", "answer": ["Green."]}]
    content = {
        "images": [{"id": 420917, "file_name": "images/v1/patch8/a.jpg", "height": 50, "width": 100, "license": 5,
                    "url": ""}],
        "annotations": [{"id": 1, "iscrowd": 0, "isfake": 0, "area": 1, "isreflected": 0,
                         "bbox": [10.0, 5.0, 30.0, 20.0],
                         "image_id": 420917, "category_id": 2}],
        "categories": [{"id": 1, "name": "Person"}, {"id": 2, "name": "Sneakers"}], "licenses": [],
    }  # fmt: skip
    write(tmp_path / "zhiyuan_objv2_train.json", content)
    (row,) = read(tmp_path, "objects365", files=["zhiyuan_objv2_train.json"])
    assert row.fields == {"objects": [{"label": "Sneakers", "box": [0.1, 0.1, 0.5, 0.4]}]} and row.id == "420917"


def test_imagenet_and_mc4(tmp_path: Path) -> None:
    write(tmp_path / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n")
    for synset in ("n01440764", "n01443537"):
        image(tmp_path / "train" / synset / f"{synset}_1.JPEG")
    rows = read(tmp_path, "imagenet")
    assert [row.fields["objects"] for row in rows] == [[{"label": "tench"}], [{"label": "goldfish"}]]
    assert rows[1].fields["class_id"] == 1 and rows[1].id == "n01443537/n01443537_1"
    write(
        tmp_path / "mc4/c4-de.tfrecord-00001-of-01024.json", '{"text": "Ein Text.", "timestamp": "2019", "url": "u"}\n'
    )
    (row,) = read(tmp_path / "mc4", "mc4")
    assert row.fields == {"text": "Ein Text.", "language": "de", "url": "u"}


def test_a_tar_or_a_text_is_read_whole_by_one_rank(tmp_path: Path) -> None:
    """Parts lie in the plan of a build, which a later start compares: all rows are written as 0 to -1."""
    for name, form in (("a.tar", "img2dataset"), ("b.jsonl", "text")):
        write(tmp_path / name, "{}\n")
        reader = open_input("own", InputConfig(path=str(tmp_path / name), format=form), BuildConfig(part_rows=2))
        assert reader.parts() == [Part("own", str(tmp_path / name), 0, -1)]


def test_a_missing_or_broken_official_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"inputs\.own: .*dataset_coco.json"):
        open_input("own", InputConfig(path=str(tmp_path), format="coco"), BuildConfig()).parts()
    write(tmp_path / "objects.json", [{"image_id": 1, "objects": []}])
    with pytest.raises(ConfigurationError, match="has no size"):
        open_input(
            "own", InputConfig(path=str(tmp_path), format="visual_genome", files=["objects.json"]), BuildConfig()
        ).parts()
