"""What a run says of its code and machines."""

import subprocess
from pathlib import Path

import pytest
import torch

from train.provenance import git_state, hardware


def test_commit_and_changes_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "code.py").write_text("x = 1\n", encoding="utf-8")
    assert git_state(tmp_path)["dirty"] is True
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    state = git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) == {"commit": None, "dirty": None}  # no git here


def test_machines_are_counted_from_the_hosts_of_all_ranks() -> None:
    found = hardware(torch.device("cpu"), ["a", "a", "b", "b"])
    assert found["hosts"] == ["a", "b"] and found["ranks_per_host"] == 2
    assert found["memory_gib"] > 0 and found["cores"] > 0 and found["device_memory_gib"] is None
