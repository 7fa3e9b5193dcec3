"""What a job runs is what was there when it was submitted: a copy of code and configuration in the run's folder.

<folder>/submitted/<digest>/code/…, and beside it the files that the submission adds. The same content is kept once.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("conf", "data", "hydra_plugins", "model", "parallel", "slurm", "train",
        "errors.py", "launcher.py", "progress.py", "terminal.py")  # fmt: skip


def take(folder: Path, files: Mapping[str, str], dry: bool = False) -> Path:
    """Copy the code, and write `files` (name -> text) beside it; returns the snapshot's folder. `dry` only names it."""
    everything = {f"code/{path.relative_to(ROOT)}": path.read_bytes() for path in code_files()}
    everything |= {name: text.encode() for name, text in {**files, "commit.txt": commit()}.items()}
    digest = hashlib.sha256()
    for name, content in sorted(everything.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    snapshot = folder / "submitted" / digest.hexdigest()[:12]
    if not dry and not snapshot.exists():
        scratch = snapshot.with_name(f"{snapshot.name}.{os.getpid()}.partial")
        for name, content in everything.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        try:
            os.replace(scratch, snapshot)
        except OSError:  # the same content, submitted twice at once
            shutil.rmtree(scratch)
    return snapshot


def code_files() -> list[Path]:
    """The files that entry points need, as they are now, committed or not."""
    found = []
    for name in CODE:
        path = ROOT / name
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    return sorted(found)


def commit() -> str:
    """The commit that is checked out, and the names of files that differ from it."""
    try:
        words = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", *CODE])
        return "".join(
            subprocess.run(each, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
            for each in words
        )
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout\n"
