"""Define an item of a task: one prompt to answer, with its id and all its references."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError


@dataclass(frozen=True)
class Item:
    """One prompt of a task."""

    id: str
    """Unique in the task; the id that the task's scorer and test server use."""
    references: tuple[str, ...]
    """All right answers; empty where the file gives none, as those of a test server."""
    text: str = ""
    """The question, in a prompt's {text}."""
    image: str = ""
    """The image's path below the task's folder of images; empty: no image."""
    image_id: str = ""
    """The image's id in the task's files."""
    language: str = "en"
    group: str = ""
    """The part of the task that it counts for: an answer type, a domain, simple or complex."""
    ocr: tuple[str, ...] = ()
    """Texts in the image, in reading order, in a prompt's {ocr}."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Other named texts of a prompt, such as {context}; boxes of a detection task."""


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file, or of JSON Lines as a list.

    Raises ConfigurationError where it is missing or no JSON.
    """
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "cannot be read"
    except UnicodeDecodeError:
        reason = "is no UTF-8 text"
    else:
        try:
            if file.suffix == ".jsonl":
                return [json.loads(line) for line in content.splitlines() if line.strip()]
            return json.loads(content)
        except ValueError as error:
            reason = f"is no JSON ({error})"
    raise ConfigurationError(f"task.files: {file} {reason}; name the file that the task's page gives.")


def get(where: str | Path, record: Any, *names: str) -> Any:
    """Return a record's value under the first of `names` that it has; raise ConfigurationError if it has none."""
    if isinstance(record, Mapping):
        for name in names:
            if name in record:
                return record[name]
    found = ", ".join(record) or "nothing" if isinstance(record, Mapping) else type(record).__name__
    raise ConfigurationError(
        f"task.files: an entry of {where} has no {' or '.join(names)} but {found[:100]}; check task.format."
    )


def text(where: str | Path, record: Any, *names: str) -> str:
    """Return a record's text or number under the first of `names` that it has, as text.

    Raises ConfigurationError where it is null or a structure: written out, that would be trained on and scored.
    """
    return _text(where, " or ".join(names), get(where, record, *names))


def _text(where: str | Path, name: str, value: Any) -> str:
    if isinstance(value, str | int | float):
        return str(value)
    found = "null" if value is None else json.dumps(value, ensure_ascii=False)[:100]
    raise ConfigurationError(
        f"task.files: an entry of {where} has no text but {found} as its {name}; remove the entry or correct it."
    )


def distinct(items: Iterable[Item], where: str | Path) -> list[Item]:
    """Return the items; raise ConfigurationError for an id that two of them have."""
    found: dict[str, Item] = {}
    for item in items:
        if item.id in found:
            raise ConfigurationError(
                f"task.files: {where} has two entries with the id {item.id}; scores are by id, so remove one."
            )
        found[item.id] = item
    if not found:
        raise ConfigurationError(f"task.files: {where} holds no entry to evaluate.")
    return list(found.values())


def no_strangers(what: str, where: str | Path, strangers: Collection[str], asked: str, of: str | Path) -> None:
    """Raise ConfigurationError where answers or captions are to ids that the task does not have."""
    if strangers:
        raise ConfigurationError(
            f"task.files: {len(strangers):,} ids of {what} in {where} are none of the {asked} of {of} (such as "
            f"{min(strangers)}); name files of one split."
        )


def texts(where: str | Path, value: Any, name: str = "answer") -> tuple[str, ...]:
    """Return answers as texts: of a text, a number, a list of them, or a list of {name: text}."""
    if value is None:
        return ()
    values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    return tuple(text(where, one, name) if isinstance(one, Mapping) else _text(where, name, one) for one in values)


Reader = Callable[[Any], list[Item]]  # of a TaskConfig
