"""Replace files in one piece, and keep what would be lost: `config.yaml` of other settings, metrics of other steps."""

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
    kept = None
    if path.exists():
        if path.read_bytes() == text.encode():
            return None
        kept = free_name(path)
        shutil.copy2(path, kept)  # a copy: a kill in between leaves the name with the old text
    scratch = path.with_name(f"{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return kept
