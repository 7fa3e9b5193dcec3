"""Replace files in one piece, and keep the old content: settings, metrics or weights of another run."""

import filecmp
import shutil
from pathlib import Path

from common.files import beside


def free_name(path: Path) -> Path:
    """Return `<name>.1`, or the same with the first number that is free."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free


def replace_text(path: Path, text: str) -> Path | None:
    """Write a text file in one piece; return the copy of an old file with other content, None where there was none."""
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
        return keep_old(path, partial)


def keep_old(path: Path, new: Path) -> Path | None:
    """Copy the file at `path` to a free name if its content differs from that of `new`; return the copy or None.

    A copy, not a rename: a process that is killed before `new` is in place leaves the old file under its name.
    """
    if not path.exists() or filecmp.cmp(path, new, shallow=False):
        return None
    kept = free_name(path)
    shutil.copy2(path, kept)
    return kept
