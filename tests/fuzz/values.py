"""Draw JSON values of wrong kinds, numbers at the edges and odd names."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")

# Values that `json.dumps` cannot write; `to_json` replaces each name by its text.
RAW = {"@huge": "1" + "0" * 400, "@digits": "9" * 5000, "@1e999": "1e999", "@deep": "[" * 3000 + "]" * 3000}
RAW |= {"@deeper": "[" * 200_000 + "]" * 200_000}

TEXTS = (
    "", " ", "\x00", "a\x00b", "\n", "\ud83d", "\udc00\ud800", "\ufeff", "\u202e", "é" * 3, "<extra_id_0>",
    "see <extra_id_3> </s> <pad>", "<unk>", "▁", "1", "0.5", "NaN", "null", "x" * 50_000, "word " * 5_000,
    "'; drop", "{", "%s %d {0}", "\\u0000", "שלום", "👩‍👩‍👧", "e\u0301",
)  # fmt: skip
NUMBERS = (
    0, -0.0, 1, -1, 2, 0.5, 1.5, 1e-300, 1e300, -1e300, 2**31, 2**63, -(2**63) - 1, 10**100, float("nan"),
    float("inf"), float("-inf"), "@huge", "@digits", "@1e999",
)  # fmt: skip
CONTAINERS: tuple[Any, ...] = (
    [], {}, [[]], [{}], {"": ""}, [None], [""], {"en": None}, {"en": []}, {"en": {"en": "x"}}, ["a", "b"], [1, 2],
    {"text": "x"}, [0.1, 0.2, 0.3], [0.9, 0.8, 0.1, 0.2], [40, 100, 200, 300], [[0.1, 0.1, 0.2, 0.2]], "@deep",
    "@deeper", [True, False, True, False], ["0.1", "0.2", "0.3", "0.4"],
)  # fmt: skip
SIMPLE = (None, True, False)
NAMES = (
    "a\nb", "a\x00b", "photo.1.v2", "photo", "./x", "../x", "/abs", "dir.d/x", "._mac", ".hidden", "x" * 90, "x" * 250,
    "é", "\udcff", "%d", "a b", "{split}", "*", "[x]", "~", "-r", "", ".", "..", "train-val", "a/b/c/d",
)  # fmt: skip
EXTENSIONS = (".json", ".jpg", ".png", ".txt", ".JPG", ".jpeg", ".webp", ".npy", ".pkl", ".cls", "", ".json.gz", ".tar")


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Draw one item."""
    return items[int(rng.integers(len(items)))]


def odd(rng: np.random.Generator) -> Any:
    """Draw a value of any kind."""
    return pick(rng, pick(rng, (TEXTS, NUMBERS, CONTAINERS, SIMPLE)))


def mutated(rng: np.random.Generator, value: Any) -> Any:
    """Copy a JSON value with one change somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = pick(rng, list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[str(odd(rng))[:100]] = changed[key]
        else:
            changed[key] = mutated(rng, value[key])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = int(rng.integers(len(value)))
        kind = rng.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return [*value, odd(rng)]
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    return pick(rng, ([value], {"en": value}, odd(rng), odd(rng), odd(rng), odd(rng)))


def to_json(value: Any) -> bytes:
    """Write a value as JSON text, and replace the names of `RAW` by their texts."""
    text = json.dumps(value)
    for word, raw in RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text.encode()


def flipped(rng: np.random.Generator, content: bytes, most: int = 8) -> bytes:
    """Copy bytes with up to `most` bits flipped, or truncated, or with a piece removed or repeated."""
    if not content:
        return content
    kind, place = rng.random(), int(rng.integers(len(content)))
    if kind < 0.15:
        return content[:place]
    if kind < 0.25:
        return content[:place] + content[place + int(rng.integers(1, 600)) :]
    if kind < 0.3:
        return content[:place] + content[max(0, place - 512) :]
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, most + 1))):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)
