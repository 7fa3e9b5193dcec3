"""Read the official files of evaluation tasks by the readers of data/tasks: one row an image, with all its items."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.command_line import CONF
from common.errors import ConfigurationError
from common.values import typed
from data.corpus.config import InputConfig
from data.corpus.inputs.ocr_file import read_ocr
from data.corpus.row import Part, Row, image_file, no_image
from data.tasks.config import FORMATS, TaskConfig
from data.tasks.item import Item
from data.tasks.read import READERS, image_path

CAPTIONS = ("coco_captions", "karpathy", "textcaps", "xm3600")
BOXES = ("coco_detection",)


class Images:
    """Read whole official files as rows once, and yield parts of them."""

    def __init__(self, name: str, config: InputConfig, part_rows: int) -> None:
        self.name, self.config, self.part_rows = name, config, part_rows
        self.root = Path(config.path)
        self._rows: list[Row] | None = None
        if not self.root.is_dir():
            raise ConfigurationError(f"inputs.{name}.path={config.path} is no folder; name that of the official files.")

    def files(self) -> list[Path]:
        """See Reader.files."""
        raise NotImplementedError

    def read(self) -> list[Row]:
        """Return all rows."""
        raise NotImplementedError

    def all_rows(self) -> list[Row]:
        """Return all rows, read at the first call."""
        if self._rows is None:
            try:
                self._rows = self.read()
            except ConfigurationError as error:
                raise ConfigurationError(f"inputs.{self.name}: {error}") from error
        return self._rows

    def parts(self) -> list[Part]:
        """See Reader.parts."""
        file, step = str(self.files()[0]), self.part_rows
        return [Part(self.name, file, start, start + step) for start in range(0, len(self.all_rows()), step)]

    def rows(self, part: Part, defects: Counter[str]) -> Iterator[Row]:
        """See Reader.rows."""
        yield from self.all_rows()[part.start : part.stop]


class TaskImages(Images):
    """Read a format of data/tasks, named by itself or by a file of conf/task."""

    def __init__(self, name: str, config: InputConfig, part_rows: int) -> None:
        super().__init__(name, config, part_rows)
        self.task = task_config(name, config)

    def files(self) -> list[Path]:
        """See Reader.files."""
        named = [*self.task.files, *([self.config.ocr] if self.config.ocr else [])]
        return [self.root / file for file in named]

    def read(self) -> list[Row]:
        """See Images.read."""
        if not self.task.files:
            raise ConfigurationError("files names no file; name the official files.")
        rooted = replace(self.task, files=[str(self.root / file) for file in self.task.files])
        words = read_ocr(self.root / self.config.ocr) if self.config.ocr else {}
        return [
            self._row(image_id, own, words) for image_id, own in by_image(READERS[self.task.format](rooted)).items()
        ]

    def _row(self, image_id: str, items: Sequence[Item], words: dict[str, Any]) -> Row:
        first = items[0]
        fields = record(items, self.task.format)
        if image_id in words:
            fields["ocr"] = words[image_id]
        image = image_file(image_path(self.task, first)) if self.task.images else no_image
        return Row(image_id or first.id, fields, image)


def task_config(name: str, config: InputConfig) -> TaskConfig:
    """Return the settings that data/tasks reads the input by. Raises ConfigurationError."""
    file = CONF / "task" / f"{config.format}.yaml"
    if file.is_file():
        plain: Any = OmegaConf.to_container(OmegaConf.load(file))
    else:
        form = "coco_detection" if config.format == "objects365" else config.format
        plain = {"format": form, "images": "images"}
    unknown = set(config.task) - {field.name for field in fields(TaskConfig)}
    if unknown:
        raise ConfigurationError(f"inputs.{name}.task.{min(unknown)} is not a setting of data/tasks; remove it.")
    plain |= config.task | {"root": config.path}
    for key in ("files", "images", "image_name", "language"):
        if getattr(config, key):
            plain[key] = getattr(config, key)
    return typed(TaskConfig, plain, f"inputs.{name}.task")


def is_task(name: str) -> bool:
    """Return whether a format is one of data/tasks, or a file of conf/task."""
    return name in FORMATS or (CONF / "task" / f"{name}.yaml").is_file()


def by_image(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Return the items of each image, in the order of the file; items without an image are of their own."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.image_id or item.id, []).append(item)
    return found


def record(items: Sequence[Item], form: str) -> dict[str, Any]:
    """Return the fields of one image: its captions by language, its boxes, or its questions with all their answers."""
    if form in CAPTIONS:
        captions: dict[str, list[str]] = {}
        for item in items:
            captions.setdefault(item.language, []).extend(item.references)
        return {"captions": captions, "group": items[0].group} if items[0].group else {"captions": captions}
    if form in BOXES:
        (item,) = items
        sides = item.extra["height"], item.extra["width"]
        return {"objects": [in_fractions(box, *sides) for box in item.extra["boxes"]]}
    questions = []
    for item in items:
        one: dict[str, Any] = {"id": item.id, "language": item.language, "question": item.text}
        one["answer"] = list(item.references)
        questions.append(one | ({"group": item.group} if item.group else {}))
    found: dict[str, Any] = {"questions": questions}
    if context := items[0].extra.get("context"):
        found["text"] = context
    if items[0].ocr:
        found["ocr"] = [{"text": text, "language": items[0].language} for text in items[0].ocr]
    return found


def in_fractions(box: Sequence[Any], height: float, width: float) -> dict[str, Any]:
    """Return [label, ymin, xmin, ymax, xmax] in pixels as an object of a record; edges outside the image are cut."""
    label, *edges = box
    sides = (height, width, height, width)
    cut = [round(min(max(edge / side, 0.0), 1.0), 6) for edge, side in zip(edges, sides, strict=True)]
    return {"label": label, "box": cut}
