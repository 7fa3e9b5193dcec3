"""No step appears twice in metrics.jsonl, and no line is lost."""

import json
import math
from pathlib import Path

import pytest

from train.run.metrics_file import MetricsFile


def test_a_resumed_file_drops_later_steps_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, restored_step=0)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 0.1 * step})
    first.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')
    again = MetricsFile(path, restored_step=2)
    again.write({"step": 3, "loss": math.nan})
    again.close()
    assert [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] == [
        {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": None},
    ]  # fmt: skip


def test_a_file_that_would_lose_all_lines_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2):
        file = MetricsFile(path, restored_step=0)
        assert file.kept == (tmp_path / "metrics.jsonl.1" if number == 2 else None)
        for step in (1, 2):
            file.write({"step": step, "loss": number})
        file.close()
    file.forget_after(1)
    assert file.kept is None and path.read_text(encoding="utf-8").count("\n") == 1
    file.forget_after(0)
    assert file.kept == tmp_path / "metrics.jsonl.2" and path.read_text(encoding="utf-8") == ""
    assert (tmp_path / "metrics.jsonl.1").read_text(encoding="utf-8").count("\n") == 2
    file.close()
    path.write_bytes(b'{"step": 1, "lo\xff')  # it has no complete line
    assert MetricsFile(path, restored_step=0).kept is None


def test_what_is_left_of_a_file_is_on_the_disk_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    metrics = MetricsFile(tmp_path / "metrics.jsonl", restored_step=0)
    metrics.write({"step": 1})
    monkeypatch.setattr("os.fsync", synced.append)
    metrics.forget_after(1)
    assert len(synced) >= 2  # the file and its name
    metrics.close()


def test_a_line_that_cannot_be_written_names_the_file_once(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", restored_step=0)
    metrics.file.close()
    metrics.file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        metrics.write({"step": 1})
    metrics.close()
