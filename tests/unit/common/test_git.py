"""The commit of the code, from git or from a job's snapshot."""

import subprocess
from pathlib import Path

import pytest

from common.git import git_state


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


def test_a_checkout_around_the_code_is_not_its_own(tmp_path: Path) -> None:
    """A snapshot in the run's folder, or a copy of the code in somebody's repository of notes."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    code = tmp_path / "submitted" / "1" / "code"
    code.mkdir(parents=True)
    (code / "run.py").write_text("x = 1\n", encoding="utf-8")
    assert git_state(code) == {"commit": None, "dirty": None}
    kept = tmp_path / "submitted" / "1" / "commit.txt"
    for text, expected in (
        ("abc\n M run.py\n", ("abc", True)),
        ("abc\n", ("abc", False)),
        ("no git checkout\n", (None, None)),
    ):
        kept.write_text(text, encoding="utf-8")
        assert tuple(git_state(code).values()) == expected
