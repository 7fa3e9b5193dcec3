"""Keep the files of weights that are not trained: written with one checkpoint, and linked into those after it.

They lie in a folder `frozen` of a checkpoint, as hard links: each checkpoint is complete by itself, whichever others
are removed, a copy of its folder holds them, and the disk has them once.
"""

import json
import os
import shutil
import warnings
import weakref
from pathlib import Path
from typing import Any

from common.errors import Notice
from parallel.checkpoint.global_plan import METADATA
from parallel.engine.base import Engine

FOLDER = "frozen"


class FrozenFiles:
    """The checkpoint that has the frozen weights of an engine as they are."""

    def __init__(self, engine: "weakref.ref[Engine]", checkpoint: Path) -> None:
        self.engine, self.checkpoint = engine, checkpoint

    def link(self, partial: Path) -> dict[str, Any]:
        """Link the files into a checkpoint that is being written; return their entries of its manifest.

        {} where they are gone or damaged, or where the disk has no links: they must be written again. A Notice names
        the last case.
        """
        try:
            manifest = json.loads((self.checkpoint / "manifest.json").read_text(encoding="utf-8"))
            entries = {name: entry for name, entry in manifest.items() if name.startswith(f"{FOLDER}/")}
            sizes = {name: (self.checkpoint / name).stat().st_size for name in entries}
            if f"{FOLDER}/{METADATA}" not in entries or any(sizes[name] != entries[name]["bytes"] for name in entries):
                return {}
        except (OSError, ValueError):
            return {}
        try:
            (partial / FOLDER).mkdir()
            for name in entries:
                os.link(self.checkpoint / name, partial / name)
        except OSError as error:
            shutil.rmtree(partial / FOLDER, ignore_errors=True)
            warnings.warn(
                f"{partial.parent} has no hard links ({error.strerror}), so each checkpoint writes the frozen weights "
                "again",
                Notice,
                stacklevel=2,
            )
            return {}
        return entries
