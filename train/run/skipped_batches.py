"""Batches that a run has gone back for: they are left out from then on, on every rank and after every restart."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigurationError
from common.files import write_text

NAME = "left_out.json"


@dataclass
class LeftOut:
    """Numbers of the batches to leave out (from 1, as steps were before any was), and how often the run went back."""

    batches: list[int] = field(default_factory=list)
    roll_backs: int = 0

    @classmethod
    def read(cls, folder: Path) -> "LeftOut":
        """What an earlier process of the run in `folder` has left out; nothing where there is no file."""
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
        """Keep it for the next process."""
        text = json.dumps({"batches": self.batches, "roll_backs": self.roll_backs})
        write_text(folder / NAME, text, durable=True)

    def batch_of(self, step: int) -> int:
        """The batch that step `step` learns from: the `step`-th of those that are not left out."""
        batch = step
        for gap in sorted(self.batches):
            batch += gap <= batch
        return batch
