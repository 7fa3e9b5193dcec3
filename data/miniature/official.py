"""Write the miniature corpus in the official formats of COCO, VQAv2, XM3600 and COCO detection.

    python -m data.miniature.official corpus=runs/corpus folder=runs/official

`python -m train.evaluate task=coco task.root=runs/official` then reads it as it reads the real files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.files import write_bytes, write_text
from common.values import at_least, one_of
from data.error_budget import Ledger
from data.shards.source import Record, ShardSource

SOURCES = ("cc3m_35l", "vq2a", "objects")  # of captions, questions and boxes
ANNOTATORS = 10  # of a question of VQAv2; all give the corpus' answer


@dataclass
class Options:
    """Write one split of the miniature corpus in official formats."""

    corpus: str = "runs/corpus"
    """Folder of the corpus."""
    folder: str = "runs/official"
    """Folder to write."""
    split: str = "test"
    """Split of the corpus: train, validation or test. It takes the place of each data set's evaluation split."""
    records: int = 256
    """Records of each source at most."""
    train_records: int = 2048
    """Records of each source's training split at most, for the training files of COCO and VQAv2."""

    def __post_init__(self) -> None:
        one_of("split", self.split, ("train", "validation", "test"))
        at_least("", 1, records=self.records, train_records=self.train_records)


def main(options: Options) -> None:
    """Write the files, and print their number."""
    folder = Path(options.folder)
    for name in ("images", "val2017"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    held_out = {source: _records(options, source, options.split, options.records) for source in SOURCES}
    train = {source: _records(options, source, "train", options.train_records) for source in SOURCES[:2]}
    validation = _records(options, SOURCES[0], "validation", options.records)
    captions, questions, objects = SOURCES
    write_captions({"test": held_out[captions], "val": validation, "train": train[captions]}, folder)
    write_questions(held_out[questions], folder, "val")
    write_questions(train[questions], folder, "train")
    write_boxes(held_out[objects], folder)
    print(f"{folder}: {sum(file.is_file() for file in folder.rglob('*')):,} files")


def write_captions(splits: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Write `dataset_coco.json` (English, Karpathy's form) and XM3600's `captions.jsonl` (all languages).

    XM3600 has the test images alone.
    """
    images, lines, number = [], [], 0
    for split, records in splits.items():
        for record in records:
            number += 1
            name = f"{number:016x}.jpg"
            _write_image(folder / "images" / name, record)
            captions = {code: _list(text) for code, text in record.fields["captions"].items()}
            if split == "test":
                own = {code: {"caption": texts} for code, texts in captions.items()}
                lines.append({"image/key": Path(name).stem} | own)
            if "en" in captions:
                sentences = [{"raw": caption} for caption in captions["en"]]
                images.append({"cocoid": number, "split": split, "filename": name, "sentences": sentences})
    _write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    write_text(folder / "captions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_questions(records: Sequence[Record], folder: Path, split: str) -> None:
    """Write VQAv2's questions and annotations of a split, train or val."""
    questions, annotations = [], []
    for number, record in enumerate(records, 1):
        _write_image(folder / "images" / f"COCO_{split}2014_{number:012}.jpg", record)
        for n, each in enumerate(record.fields["questions"]):
            ids = {"question_id": 1000 * number + n, "image_id": number}
            (answer, *_), (question, *_) = _list(each["answer"]), _list(each["question"])
            answers = [{"answer": answer, "answer_id": a} for a in range(1, ANNOTATORS + 1)]
            kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            questions.append(ids | {"question": question})
            annotations.append(ids | {"answer_type": kind, "multiple_choice_answer": answer, "answers": answers})
    _write_json(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
    _write_json(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})


def write_boxes(records: Sequence[Record], folder: Path) -> None:
    """Write COCO's `instances_val2017.json`; the corpus' boxes are shares of the image, COCO's are pixels."""
    side = 224
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    for number, record in enumerate(records, 1):
        name = f"{number:012}.jpg"
        _write_image(folder / "val2017" / name, record)
        images.append({"id": number, "file_name": name, "height": side, "width": side})
        for each in record.fields["objects"]:
            ymin, xmin, ymax, xmax = (edge * side for edge in each["box"])
            category = ids.setdefault(each["label"], len(ids) + 1)
            box = {"bbox": [xmin, ymin, xmax - xmin, ymax - ymin], "area": (xmax - xmin) * (ymax - ymin)}
            annotations.append(
                box | {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            )
    categories = [{"id": number, "name": label} for label, number in ids.items()]
    (folder / "annotations").mkdir(exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    _write_json(folder / "annotations" / "instances_val2017.json", content)


def _records(options: Options, source: str, split: str, most: int) -> list[Record]:
    """Return the first records with an image; raise ConfigurationError where there is none."""
    shards = ShardSource(source, str(Path(options.corpus, source)), split, Ledger(0.0, 1, 1))
    records = [record for record in map(shards.__getitem__, range(min(most, len(shards)))) if record.image is not None]
    if not records:
        raise ConfigurationError(f"corpus={options.corpus} has no images of {source}; make it with data.miniature.")
    return records


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _write_image(path: Path, record: Record) -> None:
    assert record.image is not None
    write_bytes(path, record.image)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
