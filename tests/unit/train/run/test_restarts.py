"""A run may restart any number of times while it makes progress."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import RunStopped
from train.run.restarts import count, stop_if_in_vain, was_restarted


def test_the_third_restart_in_vain_stops_a_run_that_may_have_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = 4
    settings = SimpleNamespace(run=SimpleNamespace(restarts_without_progress=2))
    layout = SimpleNamespace(any_rank=lambda mine: mine)
    run: Any = SimpleNamespace(
        folder=tmp_path,
        is_main_rank=True,
        config=settings,
        layout=layout,
        checkpoints=SimpleNamespace(steps_done=lambda: done),
    )
    stop_if_in_vain(run)  # started by the user
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for _ in range(2):
        stop_if_in_vain(run)
    with pytest.raises(RunStopped, match="was restarted 2 times without saving anything after step 4, so it stops"):
        stop_if_in_vain(run)
    done = 5
    stop_if_in_vain(run)  # it has made progress


def test_every_rank_stops_with_the_main_rank(tmp_path: Path) -> None:
    layout = SimpleNamespace(any_rank=lambda mine: True)
    settings = SimpleNamespace(run=SimpleNamespace(restarts_without_progress=2))
    other: Any = SimpleNamespace(
        folder=tmp_path,
        is_main_rank=False,
        config=settings,
        layout=layout,
        checkpoints=SimpleNamespace(steps_done=lambda: 4),
    )
    with pytest.raises(RunStopped):
        stop_if_in_vain(other)
    assert not list(tmp_path.iterdir())  # only the main rank counts


def test_only_restarts_without_progress_count(tmp_path: Path) -> None:
    file = tmp_path / "restarts.json"
    assert count(file, 0, restarted=False) == 0
    assert [count(file, 0, restarted=True) for _ in range(3)] == [1, 2, 3]
    assert count(file, 5, restarted=True) == 0  # it has saved something since
    assert count(file, 5, restarted=True) == 1
    assert count(file, 5, restarted=False) == 0  # started again by the user
    assert count(file, 5, restarted=True) == 1


def test_a_truncated_file_counts_from_zero(tmp_path: Path) -> None:
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
def test_a_launcher_marks_a_restart(environment: dict[str, str], expected: bool) -> None:
    assert was_restarted(environment) == expected
