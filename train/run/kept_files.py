"""Replace files in one piece, and keep what would be lost: settings, metrics or weights of another run."""

import filecmp
import os
import shutil
from pathlib import Path


def free_name(path: Path) -> Path:
    """Return `<name>.1`, or with the first number that is free."""
    number = 1
    while (place := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return place


def replace_text(path: Path, text: str) -> Path | None:
    """Write a text file in one piece; returns where one of another text is kept, None where there was none."""
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    return replace_file(path, scratch)


def replace_file(path: Path, finished: Path) -> Path | None:
    """Rename a finished file to `path`; returns where one of other content is kept, None where there was none."""
    kept = None
    if path.exists() and not filecmp.cmp(path, finished, shallow=False):
        kept = free_name(path)
        shutil.copy2(path, kept)  # a copy: a kill in between leaves the name with the old content
    os.replace(finished, path)
    return kept
