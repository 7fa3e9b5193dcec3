"""Read a task's items, and make the example of an item: its prompt and its image, without a target."""

import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.errors import ConfigurationError
from data import images, languages
from data.examples import EncodedExample, ExampleInfo
from data.objectives.base import SENTINEL
from data.skip import Skip
from data.tasks import boxes, captions, folders, questions
from data.tasks.config import TaskConfig
from data.tasks.item import Item
from data.tasks.ocr import read_ocr
from data.tokenizer import EOS, Tokenizer

READERS: dict[str, Callable[[TaskConfig], list[Item]]] = {
    "coco_captions": captions.coco_captions,
    "karpathy": captions.karpathy,
    "textcaps": captions.textcaps,
    "xm3600": captions.xm3600,
    "vqa_v2": questions.vqa_v2,
    "rows": questions.rows,
    "squad": questions.squad,
    "coco_detection": boxes.coco_detection,
    "maxm": questions.maxm,
    "image_folder": folders.image_folder,
}
OBJECTIVE = "task"  # the number in rows that a loss would be counted under


def read_task(config: TaskConfig) -> list[Item]:
    """Return the items of a task, the first `limit` of them.

    Raises ConfigurationError for files that are missing, of another format or with an id twice, and for a prompt that
    the items cannot fill.
    """
    if not config.files:
        raise ConfigurationError("task.files names no file; name the task's official files.")
    if len(config.files) > 1 and config.format in ("coco_captions", "karpathy", "textcaps", "xm3600", "coco_detection"):
        raise ConfigurationError(f"task.files names {len(config.files)} files, and task.format={config.format} is one.")
    rooted = replace(config, files=[str(Path(config.root, file)) for file in config.files])
    items = _with_ocr(config, _read(rooted)[: config.limit])
    prompt(config, items[0])
    if config.images:
        path = image_path(config, items[0])
        if not any(image_path(config, item).is_file() for item in items[:100]):
            raise ConfigurationError(
                f"task.images={config.images} has none of the task's images ({path} is missing); correct task.images "
                "or task.image_name."
            )
    return items


def _read(config: TaskConfig) -> list[Item]:
    """Return all items; raise ConfigurationError for a file in which a value has another type than in the format."""
    try:
        return READERS[config.format](config)
    except ConfigurationError:  # a ValueError
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        mistake = f"{type(error).__name__}: {error}"
    raise ConfigurationError(
        f"task.files: {', '.join(config.files)} is no file of task.format={config.format} ({mistake}); check "
        "task.format and task.fields."
    )


def _with_ocr(config: TaskConfig, items: list[Item]) -> list[Item]:
    """Return the items with the strings of `task.ocr`; raise ConfigurationError where those are of other images."""
    if not config.ocr:
        return items
    found = read_ocr([str(Path(config.root, file)) for file in config.ocr])
    if not any(item.image_id in found for item in items):
        raise ConfigurationError(
            f"task.ocr: {', '.join(config.ocr)} names none of the task's images (such as {items[0].image_id}); name "
            "the files of the same split."
        )
    return [replace(item, ocr=found.get(item.image_id, ())) for item in items]


def is_closed(config: TaskConfig) -> bool:
    """Return whether the sentinel ends the prompt."""
    return config.prompt.rstrip().endswith(SENTINEL)


def prompt(config: TaskConfig, item: Item) -> str:
    """Return the input text of an item; raise ConfigurationError for a name that the item does not have."""
    code = (languages.canonical(item.language) or item.language).upper()
    named = {**item.extra, "text": item.text, "ocr": " ".join(item.ocr), "language": code}
    unknown = {name for _, name, _, _ in string.Formatter().parse(config.prompt) if name} - named.keys()
    if unknown:
        raise ConfigurationError(
            f"task.prompt has {{{min(unknown)}}}, which the items lack; they have {', '.join(sorted(named))}."
        )
    return " ".join(config.prompt.format(**named).split())


def image_path(config: TaskConfig, item: Item) -> Path:
    """Return the file of an item's image."""
    return Path(config.root, config.images, config.image_name.format(image=item.image, image_id=item.image_id))


def encode_item(config: TaskConfig, item: Item, tokenizer: Tokenizer, image_size: int, index: int) -> EncodedExample:
    """Make the example of an item, to be answered. Raises Skip where its image cannot be read."""
    pixels = np.zeros((0, image_size, image_size, 3), np.uint8)
    if config.images:
        try:
            content = image_path(config, item).read_bytes()
        except OSError as error:
            raise Skip("missing image", defect=True, detail=str(error)) from error
        pixels = images.decode(content, image_size)[None]
    text = prompt(config, item)
    closed = is_closed(config)
    ids = tokenizer.encode_prompt(text) if closed else tokenizer.encode(text)
    info = ExampleInfo(
        source=config.name,
        objective=OBJECTIVE,
        key=item.id,
        shard="",
        language=item.language,
        input_text=text,
        target_text=item.references[0] if item.references else "",
        component=config.name,
        index=index,
        references=item.references,
    )
    return EncodedExample(np.array([*ids, EOS], np.int32), np.array([EOS], np.int32), info, pixels, closing=1 + closed)
