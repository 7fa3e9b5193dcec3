"""Keep the batches that a run leaves out after a roll-back, and the examples of the steps that it skipped."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.files import write_text

NAME = "left_out.json"
MOST_FILES = 20  # files of skipped steps; a global batch of 4096 examples takes some 3 MB


@dataclass
class SkippedBatches:
    """The batches that a run leaves out from now on, on every rank and after every restart."""

    batches: list[int] = field(default_factory=list)
    """Numbers from 1: without left-out batches, step b trains on batch b."""
    roll_backs: int = 0
    """Roll-backs of the run until now."""

    @classmethod
    def from_folder(cls, folder: Path) -> "SkippedBatches":
        """Read what earlier processes of a run left out; none where there is no file."""
        path = folder / NAME
        if not path.exists():
            return cls()
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"{path} names the batches that the run leaves out, and cannot be read ({error}); bring it back from a "
                "copy, or remove it to learn from all batches again."
            ) from error

    def write(self, folder: Path) -> None:
        """Write the file for the next process of the run."""
        text = json.dumps({"batches": self.batches, "roll_backs": self.roll_backs})
        write_text(folder / NAME, text, durable=True)

    def batch_number(self, step: int) -> int:
        """Return the batch that a step learns from: the `step`-th of those that are not left out."""
        batch = step
        for left_out in sorted(self.batches):
            batch += left_out <= batch
        return batch


def save_bad_batch(folder: Path, step: int, cause: str, examples: list[dict[str, Any]]) -> Path:
    """Write the ids of a skipped step's examples, so that the cause can be found in the data.

    The newest `MOST_FILES` of these files stay in the folder.
    """
    path = folder / f"bad_batch_step_{step:08d}.json"
    write_text(path, json.dumps({"step": step, "cause": cause, "examples": examples}, indent=1, ensure_ascii=False))
    written = sorted(folder.glob("bad_batch_step_*.json"), key=lambda file: (file != path, -file.stat().st_mtime_ns))
    for file in written[MOST_FILES:]:
        file.unlink(missing_ok=True)
    return path
