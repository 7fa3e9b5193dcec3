"""Read golden files: values that were computed once, and that every later computation must reproduce.

No test writes them. `python -m tests.golden` shows what changes, and writes it where a reason is given.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
BECAUSE = "because"  # the entry that holds the reason of the last change
# File -> the function, by name, that computes its lists (of numbers or words) again.
FILES = {"equivalence": "tests.distributed.problem:golden_curve"}

Lists = dict[str, list[Any]]


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def expected(name: str) -> Lists:
    """Read the lists of a golden file, without the reason; {} if there is no file yet."""
    path = path_of(name)
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: values for key, values in held.items() if key != BECAUSE}


def computed(name: str) -> Lists:
    """Compute what a golden file should hold now."""
    module, _, function = FILES[name].partition(":")
    lists: Lists = getattr(import_module(module), function)()
    return lists
