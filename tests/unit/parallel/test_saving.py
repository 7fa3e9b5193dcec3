"""Who waits for a checkpoint is alive, and says so."""

import time
from pathlib import Path

import pytest

import progress
from parallel import checkpoint


def test_waiting_for_a_save_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    monkeypatch.setattr(progress, "listeners", [places.append])
    monkeypatch.setattr(checkpoint, "SIGN_OF_LIFE_S", 0.02)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.writing = saver.thread.submit(time.sleep, 0.3)
    saver.wait()
    assert len(places) > 2 and set(places) == {f"waiting for a checkpoint in {tmp_path}"}
