"""Waiting for a checkpoint reports progress to the watchdog."""

import threading
from pathlib import Path

import pytest

from common import progress
from parallel.checkpoint import checkpointer as checkpoint


def test_waiting_for_a_save_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    written = threading.Event()  # until three reports have arrived

    def listen(place: str) -> None:
        places.append(place)
        if len(places) == 3:
            written.set()

    monkeypatch.setattr(progress, "listeners", [listen])
    monkeypatch.setattr(checkpoint, "BEAT_EVERY_S", 0.01)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.writing = saver.thread.submit(written.wait, 60)
    saver.wait()
    assert written.is_set() and set(places) == {f"waiting for a checkpoint in {tmp_path}"}
