"""Find the items of an evaluation or a validation whose images a model is trained on."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.progress import beat
from data.tasks.config import TRAIN, TaskConfig
from data.tasks.item import Item
from data.tasks.read import image_path
from data.tasks.source import part_items

THREADS = 8


def seen_in_training(task: TaskConfig, items: Sequence[Item], trained: Iterable[TaskConfig]) -> list[str]:
    """Return the ids of the items whose image is also that of a training item of the tasks in `trained`.

    A text alone is seen where a training item has its text and references. Files are compared by size, and those of
    equal size by SHA-256; one that cannot be read is of no other. Another compression of an image is not found.
    """
    files: set[Path] = set()
    texts: set[tuple[str, tuple[str, ...]]] = set()
    for each in trained:
        part = each.for_part(TRAIN)
        own = part_items(each, TRAIN)
        files |= {image_path(part, item) for item in own} if part.images else set()
        texts |= set() if part.images else {(item.text, item.references) for item in own}
    if not task.images:
        return [item.id for item in items if (item.text, item.references) in texts]
    wanted = {item.id: image_path(task, item) for item in items}
    same = _equal_files(set(wanted.values()), files)
    return [id_ for id_, path in wanted.items() if path in same]


def trained_on(task: TaskConfig, split: str, items: Iterable[Item]) -> list[str]:
    """Return the ids of a split's items whose image file, or whose text, is that of a training item of the task.

    No file is read: a copy under another name is not found.
    """

    def place(part: TaskConfig, item: Item) -> object:
        return image_path(part, item) if part.images else (item.text, item.references)

    training, own = task.for_part(TRAIN), task.for_part(split)
    trained = {place(training, item) for item in part_items(task, TRAIN)}
    return [item.id for item in items if place(own, item) in trained]


def _equal_files(ours: set[Path], others: set[Path]) -> set[Path]:
    """Return those of our files that equal one of the others."""
    with ThreadPoolExecutor(THREADS) as threads:
        by_size: dict[int, list[Path]] = defaultdict(list)
        for path, size in zip(others, threads.map(_size, others), strict=True):
            beat("comparing with the training images")
            by_size[size].append(path)
        candidates = {path: size for path, size in zip(ours, threads.map(_size, ours), strict=True) if size in by_size}
        theirs = {path for size in set(candidates.values()) if size >= 0 for path in by_size[size]}
        digests = set(filter(None, threads.map(_digest, theirs)))
        return {path for path in candidates if _digest(path) in digests}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None
