"""Copy code and configuration into the run's folder at submission, so that later edits do not reach the job.

<folder>/submitted/<digest>/code/…, and beside it the files that the submission adds. Equal content shares one folder.
"""

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from common.errors import ConfigurationError
from common.git import SNAPSHOT, snapshot_text

ROOT = Path(__file__).resolve().parent.parent
CODE = ("common", "conf", "data", "evaluation", "hydra_plugins", "model", "parallel", "slurm", "train")
SUFFIXES = (".py", ".pyi", ".yaml", ".yml", ".toml", ".html", ".sbatch", ".sh",
            ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")  # fmt: skip
# Folders of other programs and of the output of runs. `data/` is a package, but users put data there too.
NOT_OURS = ("__pycache__", "site-packages", "node_modules", "runs", "wandb", "outputs", "multirun")
MIB = 2**20
FILE_MIB, TOTAL_MIB = 2, 20  # this project's code takes 0.7 MiB, its largest file 0.03
ENTRIES = 200_000  # most names to look at; a folder with more holds data, and the search would take minutes


def take(folder: Path, files: Mapping[str, str], dry: bool = False) -> Path:
    """Copy the code, and write `files` (name -> text) beside it; return the snapshot's folder.

    `dry`: return the folder's name and write nothing. Only their owner can read the files beside the code, because a
    site's environment may hold keys. Raises ConfigurationError for files that cannot be read or are too large for code.
    """
    code = {f"code/{path.relative_to(ROOT)}": content(path) for path in code_files()}
    beside = {
        name: text.encode()
        for name, text in {**files, SNAPSHOT: snapshot_text(ROOT, [top.name for top in _tops()])}.items()
    }
    everything = code | beside
    digest = hashlib.sha256()
    for name, its in sorted(everything.items()):
        digest.update(os.fsencode(name) + f" {len(its)} ".encode() + its)
    snapshot = folder / "submitted" / digest.hexdigest()[:12]
    if ":" in str(snapshot.absolute()):
        raise ConfigurationError(f"{folder.absolute()} has a colon in its name, which PYTHONPATH cuts; rename it.")
    if not dry and not snapshot.exists():
        _publish(everything, snapshot, private=set(beside))
    return snapshot


def _publish(everything: Mapping[str, bytes], snapshot: Path, private: set[str]) -> None:
    """Write the files into a partial folder, and rename it when it is whole."""
    partial = snapshot.with_name(f"{snapshot.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        for name, its in everything.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600 if name in private else 0o666), "wb") as opened:
                opened.write(its)
        os.replace(partial, snapshot)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not snapshot.is_dir():  # else another submission has just written the same content
            raise


def code_files() -> list[Path]:
    """Return the files of code and configuration, committed or not.

    Raises ConfigurationError where they are too many or too large for code, before any of them is read.
    """
    found = sorted(path for top in _tops() for path in _below(top))
    sizes = {path: path.stat().st_size for path in found}
    large = [path for path, size in sizes.items() if size > FILE_MIB * MIB]
    if large or sum(sizes.values()) > TOTAL_MIB * MIB:
        largest = sorted(large or found, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path.relative_to(ROOT)} ({sizes[path] / MIB:.1f} MiB)" for path in largest)
        raise ConfigurationError(
            f"The code that a job takes along is {sum(sizes.values()) / MIB:.1f} MiB in {len(found)} files (at most "
            f"{TOTAL_MIB} MiB, {FILE_MIB} MiB a file); move files that are not code out of {ROOT}, first {named}."
        )
    return found


def _tops() -> list[Path]:
    return [top for name in CODE for top in sorted(ROOT.glob(name))]


def _below(top: Path) -> Iterator[Path]:
    """Yield the code files at or below `top`; follow a link to a folder only if that folder itself holds code."""
    if _is_code(top):
        yield top
    looked_at, seen = 0, set()
    for place, folders, files in os.walk(top, followlinks=True):
        folder = Path(place)
        looked_at += len(folders) + len(files)
        if looked_at > ENTRIES:
            raise ConfigurationError(
                f"{top} holds more than {ENTRIES:,} files ({folder.relative_to(ROOT)} is among them); move "
                "data out of it (data.root and data.sources accept any folder)."
            )
        where = folder.stat()
        if (where.st_dev, where.st_ino) in seen:  # a link leads back to a folder above it
            folders.clear()
            continue
        seen.add((where.st_dev, where.st_ino))
        folders[:] = [name for name in folders if _may_hold_code(folder / name)]
        yield from (folder / name for name in files if _is_code(folder / name))


def _may_hold_code(folder: Path) -> bool:
    if folder.name.startswith(".") or folder.name in NOT_OURS or (folder / "pyvenv.cfg").exists():
        return False
    if not folder.is_symlink():
        return True
    try:
        return any(_is_code(path) for path in folder.iterdir())
    except OSError:
        return False


def _is_code(path: Path) -> bool:
    """Return whether a file is one of code or configuration; an editor's files are hidden."""
    return path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file()


def content(path: Path) -> bytes:
    """Return the bytes of a code file. Raises ConfigurationError where it cannot be read."""
    try:
        with path.open("rb") as opened:
            its = opened.read(FILE_MIB * MIB + 1)
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode) or len(its) > FILE_MIB * MIB:
                raise OSError(0, "it changes while it is copied")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be copied for the job ({error.strerror}); make it readable, or move it out of {ROOT}."
        ) from error
    return its
