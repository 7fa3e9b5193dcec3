"""A save that failed in the background ends the run wherever its outcome is awaited, with the right exit code."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.errors import RunStopped, StorageFailed
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.together import SaveFailed, SaveStalled
from train.run.checkpoints import RunCheckpoints


@dataclass
class Settings:
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.mark.parametrize("wait", ["restore", "save", "settle", "check_older"])
@pytest.mark.parametrize(("failed", "raised"), [(SaveFailed, RunStopped), (SaveStalled, StorageFailed)])
def test_a_failed_save_ends_the_run(
    tmp_path: Path, wait: str, failed: type[SaveFailed], raised: type[RunStopped | StorageFailed]
) -> None:
    checkpoints: Any = RunCheckpoints.__new__(RunCheckpoints)
    checkpoints.checkpointer, checkpoints.config = Checkpointer(tmp_path), Settings()
    checkpoints.tokenizer, checkpoints.sources, checkpoints.saved_at = "", {}, 0.0
    arguments = {"restore": (None,), "save": (None, 3, {}), "settle": (), "check_older": (2, 1)}[wait]
    checkpoints.checkpointer.writing = Future()
    checkpoints.checkpointer.writing.set_exception(failed("the disk"))
    assert checkpoints.checkpointer.failed
    with pytest.raises(raised, match="the disk") as ended:
        getattr(checkpoints, wait)(*arguments)
    assert not ended.value.alone, "every rank raises it"
    assert checkpoints.saved_at == 0.0
