"""Read the state of the git checkout that holds the code, if one does."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_S = 20  # a repository on a slow network drive must not hold up a run


def git(folder: Path, *words: str) -> str | None:
    """Return what git prints in `folder`, or None where it fails, is missing or takes too long."""
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


def commit_of(folder: Path) -> str | None:
    """Return the commit that holds the files of `folder`.

    None for a folder that merely lies below a checkout of something else, which says nothing of these files.
    """
    return git(folder, "rev-parse", "HEAD") if git(folder, "ls-files", "--", ".") else None


def commit_text(folder: Path, paths: Sequence[str]) -> str:
    """Return the commit of `folder`, and the files of `paths` (git pathspecs) that differ from it, one a line."""
    commit = commit_of(folder)
    if commit is None:
        return "no git checkout\n"
    changes = git(folder, "status", "--porcelain", "--", *paths)
    return f"{commit}\n" + ("git status failed\n" if changes is None else f"{changes}\n" if changes else "")
