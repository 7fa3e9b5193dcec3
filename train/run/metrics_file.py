"""Write `metrics.jsonl` of a run: one JSON object per step, one per line."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from common.files import raise_with_name, write_text
from train.run.kept_files import free_name

Line = dict[str, Any]  # one step's metrics by name, such as `loss/vqa`


class MetricsFile:
    """Append lines to `metrics.jsonl`; drop the lines of steps that will run again.

    `kept`: where the old file was moved because none of its lines would have stayed, otherwise None.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        """Open the file; of an existing one, keep the steps up to `restored_step`."""
        self.path = path
        self.kept: Path | None = None
        if path.exists():
            self._cut(restored_step)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def forget_after(self, step: int) -> None:
        """Drop the lines after `step`, whose steps will run again."""
        self.file.close()
        self._cut(step)
        self.file = self.path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append one line; values that are not finite become null, because JSON has no NaN."""
        text = json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False)
        try:
            self.file.write(f"{text}\n")
            self.file.flush()
        except OSError as error:
            with suppress(OSError):  # close() flushes again, and would raise an error without the file's name
                self.file.close()
            raise_with_name(error, self.path)

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _cut(self, step: int) -> None:
        """Drop the lines of later steps, and a last line that a kill left half written."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        self.kept = None
        left = [text for text in lines if _parse_step(text) <= step]
        if not left and any(_parse_step(text) < math.inf for text in lines):
            self.kept = free_name(self.path)
            os.replace(self.path, self.kept)
        write_text(self.path, "".join(text + "\n" for text in left), durable=True)


def _parse_step(text: str) -> float:
    """Return the step of a line, infinity where the line cannot be read."""
    try:
        return float(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
