"""Write the miniature corpus in the official formats of COCO, VQAv2, XM3600 and COCO detection.

    python -m data.miniature.official corpus=runs/corpus folder=runs/official

`python -m train.evaluate task=coco task.root=runs/official` then reads it as it reads the real files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from common.files import write_bytes, write_text
from common.values import at_least, one_of
from data.error_budget import Ledger
from data.shards.source import Record, ShardSource

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

    def __post_init__(self) -> None:
        one_of("split", self.split, ("train", "validation", "test"))
        at_least("", 1, records=self.records)


def main(options: Options) -> None:
    """Write the files, and print their number."""
    folder = Path(options.folder)
    writers = {"cc3m_35l": (write_captions, "images"), "vq2a": (write_questions, "images"),
               "objects": (write_boxes, "val2017")}  # fmt: skip
    for source, (write, images) in writers.items():
        records = list(_records(options, source))
        if not records:
            raise ConfigurationError(f"corpus={options.corpus} has no images of {source}; make it with data.miniature.")
        (folder / images).mkdir(parents=True, exist_ok=True)
        write(records, folder)
    print(f"{folder}: {sum(file.is_file() for file in folder.rglob('*')):,} files")


def write_captions(records: Sequence[Record], folder: Path) -> None:
    """Write `dataset_coco.json` (English, Karpathy's form) and XM3600's `captions.jsonl` (all languages)."""
    images, lines = [], []
    for number, record in enumerate(records, 1):
        name = f"{number:016x}.jpg"
        _write_image(folder / "images" / name, record)
        captions = {code: _list(text) for code, text in record.fields["captions"].items()}
        lines.append({"image/key": Path(name).stem} | {code: {"caption": own} for code, own in captions.items()})
        if "en" in captions:
            sentences = [{"raw": caption} for caption in captions["en"]]
            images.append({"cocoid": number, "split": "test", "filename": name, "sentences": sentences})
    _write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    write_text(folder / "captions.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_questions(records: Sequence[Record], folder: Path) -> None:
    """Write VQAv2's questions and annotations of the validation split."""
    questions, annotations = [], []
    for number, record in enumerate(records, 1):
        _write_image(folder / "images" / f"COCO_val2014_{number:012}.jpg", record)
        for n, each in enumerate(record.fields["questions"]):
            ids = {"question_id": 1000 * number + n, "image_id": number}
            (answer, *_), (question, *_) = _list(each["answer"]), _list(each["question"])
            answers = [{"answer": answer, "answer_id": a} for a in range(1, ANNOTATORS + 1)]
            kind = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
            questions.append(ids | {"question": question})
            annotations.append(ids | {"answer_type": kind, "multiple_choice_answer": answer, "answers": answers})
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


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


def _records(options: Options, source: str) -> Iterator[Record]:
    shards = ShardSource(source, str(Path(options.corpus, source)), options.split, Ledger(0.0, 1, 1))
    for number in range(min(options.records, len(shards))):
        record = shards[number]
        if record.image is not None:
            yield record


def _list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _write_image(path: Path, record: Record) -> None:
    assert record.image is not None
    write_bytes(path, record.image)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False))


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
