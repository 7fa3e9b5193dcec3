"""Who waits for a checkpoint is alive, and says so."""

import threading
from pathlib import Path

import pytest

from common import progress
from parallel.checkpoint import checkpointer as checkpoint


def test_waiting_for_a_save_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    written = threading.Event()  # as long as nobody has heard three signs

    def listen(place: str) -> None:
        places.append(place)
        if len(places) == 3:
            written.set()

    monkeypatch.setattr(progress, "listeners", [listen])
    monkeypatch.setattr(checkpoint, "SIGN_OF_LIFE_S", 0.01)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.writing = saver.thread.submit(written.wait, 60)
    saver.wait()
    assert written.is_set() and set(places) == {f"waiting for a checkpoint in {tmp_path}"}
