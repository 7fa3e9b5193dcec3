"""A run may be restarted as often as it likes, as long as it comes further."""

from pathlib import Path

import pytest

from train.restarts import count, was_restarted


def test_only_restarts_without_progress_count(tmp_path: Path) -> None:
    file = tmp_path / "restarts.json"
    assert count(file, 0, restarted=False) == 0
    assert [count(file, 0, restarted=True) for _ in range(3)] == [1, 2, 3]
    assert count(file, 5, restarted=True) == 0  # it has saved something since
    assert count(file, 5, restarted=True) == 1
    assert count(file, 5, restarted=False) == 0  # its user has started it again
    assert count(file, 5, restarted=True) == 1


def test_a_file_that_a_kill_cut_short_counts_anew(tmp_path: Path) -> None:
    file = tmp_path / "restarts.json"
    file.write_text('{"step": 3, "rest', encoding="utf-8")
    assert count(file, 3, restarted=True) == 0
    assert count(file, 3, restarted=True) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": "2"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_who_restarted(environment: dict[str, str], expected: bool) -> None:
    assert was_restarted(environment) == expected
