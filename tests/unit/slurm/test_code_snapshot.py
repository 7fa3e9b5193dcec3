"""A job's snapshot: code and configuration as they are now, and no data that users keep beside them."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from slurm import code_snapshot as snapshot
from slurm.code_snapshot import MIB, code_files, take


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one file of code in every place."""
    root = tmp_path / "check out"
    for name in snapshot.CODE:
        file = root / name / "a.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(snapshot, "ROOT", root)
    return root


def taken(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in code_files()}


def write(path: Path, size: int = 1) -> Path:
    """A file of so many bytes that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as opened:
        opened.truncate(size)
    return path


def test_what_people_keep_beside_the_code_stays_there(root: Path) -> None:
    before = taken(root)
    for name in ("data/cc3m/00000.tar", "data/cc3m/00000.json", "data/cc3m/photo.jpg", "model/weights.safetensors",
                 "model/__pycache__/a.py", "data/.venv/b.py", "train/wandb/c.yaml", "data/runs/x/config.yaml",
                 "model/.#a.py", "train/notes.txt", "train/a.py~", "parallel/env/lib/a.py"):  # fmt: skip
        write(root / name, 2**40 if name.endswith(".tar") else 1)
    write(root / "parallel" / "env" / "pyvenv.cfg")
    os.mkfifo(root / "model" / "pipe.py")
    assert taken(root) == before


def test_new_code_goes_along(root: Path) -> None:
    new = {"data/objectives/mine.py", "conf/experiment/mine.yaml", "slurm/mine.sbatch", "slurm/mine.sh",
           "model/kernels/mine.cu", "conf/mine.yml"}  # fmt: skip
    for name in new:
        write(root / name)
    assert new <= taken(root)


def test_links(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "mine.py")
    write(tmp_path / "photos" / "deep" / "mine.py")
    (root / "model" / "linked.py").symlink_to(tmp_path / "elsewhere" / "mine.py")
    (root / "model" / "package").symlink_to(tmp_path / "elsewhere")
    (root / "data" / "photos").symlink_to(tmp_path / "photos")  # no code right behind it: not looked at
    (root / "model" / "gone.py").symlink_to(tmp_path / "gone.py")
    (root / "model" / "circle").symlink_to(root / "model")
    found = taken(root)
    assert {"model/linked.py", "model/package/mine.py"} <= found
    assert not found & {"model/gone.py", "data/photos/deep/mine.py", "model/circle/circle/a.py"}
    copy = take(tmp_path / "run", {}) / "code" / "model" / "linked.py"
    assert copy.is_file() and not copy.is_symlink()


@pytest.mark.parametrize("sizes", [[3 * MIB], [2 * MIB - 1] * 11])
def test_what_is_too_large_for_code_is_one_sentence(sizes: list[int], root: Path, tmp_path: Path) -> None:
    for number, size in enumerate(sizes):
        write(root / "conf" / f"large{number}.yaml", size)
    with pytest.raises(
        ConfigurationError, match=r"at most 20 MiB, 2 MiB a file\); move .* conf/large0.yaml \([23].0 MiB"
    ):
        take(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_too_many_files_to_look_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ENTRIES", 5)
    for number in range(6):
        write(root / "data" / "cc3m" / f"{number}.jpg")
    with pytest.raises(ConfigurationError, match=r"holds more than 5 files \(data/cc3m is among them"):
        code_files()


def test_what_cannot_be_copied_is_named(root: Path, tmp_path: Path) -> None:
    path = root / "model" / "a.py"
    path.unlink()
    with pytest.raises(ConfigurationError, match=r"model/a.py cannot be copied for the job \(No such file"):
        snapshot.content(path)


def test_odd_names(root: Path, tmp_path: Path) -> None:
    odd = [b"sp ace.yaml", b"quo\"te'.yaml", b"new\nline.yaml", b"\xff.yaml"]
    for name in odd:
        write(root / "conf" / os.fsdecode(name))
    copy = take(tmp_path / "a run's\nfolder", {})
    assert all((copy / "code" / "conf" / os.fsdecode(name)).exists() for name in odd)
    with pytest.raises(ConfigurationError, match="has a colon in its name, which PYTHONPATH cuts"):
        take(tmp_path / "a:b", {})


def test_only_the_owner_reads_what_may_hold_keys(root: Path, tmp_path: Path) -> None:
    copy = take(tmp_path / "run", {"site.sh": "export KEY=1\n"})
    assert stat.S_IMODE((copy / "site.sh").stat().st_mode) == 0o600
    assert (copy / "code" / "common" / "a.py").stat().st_mode & 0o044 or os.umask(os.umask(0)) & 0o044


def test_nothing_is_left_where_writing_fails(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        take(tmp_path / "run", {})
    assert list((tmp_path / "run" / "submitted").iterdir()) == []


def test_the_commit_is_of_the_code_or_none(root: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C"]
    subprocess.run([*git, str(tmp_path), "init", "-q"], check=True)
    subprocess.run([*git, str(tmp_path), "commit", "-q", "--allow-empty", "-m", "notes"], check=True)
    kept = take(tmp_path / "run", {}) / "commit.txt"
    assert kept.read_text(encoding="utf-8") == "no git checkout\n"  # the repository around holds none of it
    subprocess.run([*git, str(root), "init", "-q"], check=True)
    subprocess.run([*git, str(root), "add", "model"], check=True)
    subprocess.run([*git, str(root), "commit", "-q", "-m", "code"], check=True)
    (root / "model" / "a.py").write_text("x = 2\n", encoding="utf-8")
    commit, *changes = (take(tmp_path / "run", {}) / "commit.txt").read_text(encoding="utf-8").splitlines()
    assert len(commit) == 40 and " M model/a.py" in changes and "?? train/" in changes
