"""Read the state of the git checkout that holds the code, if one does."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODE = Path(__file__).resolve().parent.parent
SNAPSHOT = "commit.txt"  # file beside the folder `code` of a job's snapshot (slurm/code_snapshot.py)
TIMEOUT_S = 20  # a repository on a slow network drive must not delay a run


def git(folder: Path, *words: str) -> str | None:
    """Return the output of git in `folder`, or None where git fails, is missing or takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip("\n") if done.returncode == 0 else None


def code_commit(folder: Path) -> str | None:
    """Return the commit that holds the files of `folder`.

    None for a folder in a checkout that does not track these files.
    """
    return git(folder, "rev-parse", "HEAD") if git(folder, "ls-files", "--", ".") else None


def snapshot_text(folder: Path, paths: Sequence[str]) -> str:
    """Return the commit of `folder`, and the files of `paths` (git pathspecs) that differ from it, one a line."""
    commit = code_commit(folder)
    if commit is None:
        return "no git checkout\n"
    changes = git(folder, "status", "--porcelain", "--", *paths)
    return f"{commit}\n" + ("git status failed\n" if changes is None else f"{changes}\n" if changes else "")


def git_state(code: Path = CODE) -> dict[str, Any]:
    """Return `commit` and `dirty` (uncommitted changes) of the code, both None where no commit holds it.

    A job's snapshot has them in a file, because the checkout may have changed since the submission.
    """
    kept = code.parent / SNAPSHOT
    if code.name == "code" and kept.is_file():
        first, *changed = kept.read_text(encoding="utf-8").splitlines()
        is_commit = len(first.split()) == 1
        return {"commit": first if is_commit else None, "dirty": bool(changed) if is_commit else None}
    commit, changes = code_commit(code), git(code, "status", "--porcelain")
    if commit is None and git(code, "rev-parse", "HEAD"):
        changes = None  # the changes are those of a checkout around the folder
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}
