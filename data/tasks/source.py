"""Give a task's items as records, so that a mixture trains on official files as on shards."""

import hashlib
from collections.abc import Sequence
from typing import Any

from common.errors import ConfigurationError
from data.fields import Uses
from data.shards.source import Record, SourceFacts
from data.skip import Skip
from data.storage import retry
from data.tasks.config import TaskConfig
from data.tasks.item import Item
from data.tasks.read import image_path, is_closed, prompt, read_task

KEPT = 8  # parts of tasks whose items stay in memory: the checks and every opening of a source read the same


class Everything(Sequence[tuple[int, int]]):
    """The selection of all records of a source, as (record, item)."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, place: Any) -> Any:
        """Return (record, item) of a place."""
        return place, 0


class ItemSource:
    """Give random access to the items of a part of a task, as `ShardSource` does to records.

    A record has the key `item.id`, the encoded image, and the fields that `data/objectives/task.py` reads. `facts`
    identifies the items and the prompt by their texts.
    """

    def __init__(self, name: str, config: TaskConfig, split: str, retry_s: float) -> None:
        """Read the items of a split; raise ConfigurationError as `read_task` does. Those without references are left.

        `retry_s`: seconds for which a read of an image is tried again.
        """
        self.name, self.config, self.retry_s = name, config.for_part(split), retry_s
        self.items = part_items(config, split)
        self.shard_name = ", ".join(self.config.files)
        digest = hashlib.sha256(self.config.prompt.encode("utf-8", "surrogatepass"))
        for item in self.items:
            digest.update(f"{item}\n".encode("utf-8", "surrogatepass"))
        self.facts = SourceFacts(len(self.items), len(self.config.files), digest.hexdigest())

    def __len__(self) -> int:
        return len(self.items)

    def shard(self, number: int) -> str:
        """Return the names of the task's files."""
        return self.shard_name

    def key(self, number: int) -> str:
        """Return an item's id."""
        return self.items[number].id

    def numbered(self, number: int) -> int:
        """Return the number of an item among all: the same."""
        return number

    def usable(self, objective: str, uses: Uses | None, items: bool) -> "Everything":
        """Return all items: each has a reference, and is an item of its record."""
        return Everything(len(self.items))

    def __getitem__(self, number: int) -> Record:
        """See `read`."""
        return self.read(number)

    def read(self, number: int, image: bool = True) -> Record:
        """Return an item with its image; raise Skip (a defect) for an image that cannot be read.

        Without `image` its bytes are not read, and are b"" where the item has one.
        """
        item, content = self.items[number], b"" if self.config.images else None
        if self.config.images and image:
            path = image_path(self.config, item)
            try:
                content = retry(path.read_bytes, str(path), self.retry_s)
            except OSError as error:
                raise Skip("missing image", defect=True, detail=str(error)) from error
        fields = {
            "prompt": prompt(self.config, item),
            "closed": is_closed(self.config),
            "references": list(item.references),
            "language": item.language,
            "has_image": bool(self.config.images),
        }
        return Record(item.id, self.shard_name, fields, content)

    def image(self, number: int, at: tuple[int, int] | None = None) -> bytes | None:
        """Return the encoded image of an item, None where the task has none; raise as `read`. `at` is not used."""
        return self.read(number).image


def part_items(config: TaskConfig, split: str) -> list[Item]:
    """Return the items of a task's part that have references: there is nothing to learn from the others.

    Raises ConfigurationError as `read_task` does, and where no item has references.
    """
    part = config.for_part(split)
    key = f"{split} {part}"
    if key not in _READ:
        while len(_READ) >= KEPT:
            _READ.pop(next(iter(_READ)))
        _READ[key] = [item for item in read_task(part) if item.references]
    if not _READ[key]:
        raise ConfigurationError(
            f"task.files: no {split} item of {part.name} has a reference; name files with captions or answers."
        )
    return _READ[key]


_READ: dict[str, list[Item]] = {}
