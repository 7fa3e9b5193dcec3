"""Without a home, libraries keep their caches where only this user writes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slurm.code_snapshot import ROOT
from train.caches import CACHES, READ_TOO, private_folder, set_writable_caches


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("home", ["/nonexistent/me", "/", "~", "/dev/null"])
def test_without_a_home_all_caches_have_a_place(home: str, temporary: Path) -> None:
    environment = {"HOME": home, "HF_HOME": "/mine"}
    set_writable_caches(environment)
    assert environment.pop("HF_HOME") == "/mine"
    assert environment.keys() == {"HOME", *CACHES} - {"HF_HOME"}
    place = temporary / f"pali-caches-{os.getuid()}"
    assert place.stat().st_mode & 0o777 == 0o700
    assert all(value.startswith(f"{place}/") for name, value in environment.items() if name != "HOME")


def test_a_home_stays_in_use(temporary: Path) -> None:
    environment = {"HOME": str(temporary)}
    set_writable_caches(environment)
    assert environment == {"HOME": str(temporary)}


def test_a_home_that_can_only_be_read_is_still_read(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0)
    environment = {"HOME": str(temporary)}
    set_writable_caches(environment)
    assert environment.keys() == {"HOME", *CACHES} - {*READ_TOO}


@pytest.mark.parametrize("trap", ["link", "file", "open"])
def test_a_place_that_others_write_to_is_not_taken(trap: str, tmp_path: Path) -> None:
    """Libraries load code from their caches."""
    place = tmp_path / f"pali-caches-{os.getuid()}"
    if trap == "link":
        (tmp_path / "theirs").mkdir()
        place.symlink_to(tmp_path / "theirs")
    elif trap == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)
    taken = private_folder(tmp_path)
    assert taken != place and taken.stat().st_mode & 0o777 == 0o700


def test_it_is_done_before_libraries_are_imported(tmp_path: Path) -> None:
    program = "import train, sys, os; print('torch' in sys.modules, os.environ['TRITON_CACHE_DIR'])"
    environment = os.environ | {"HOME": "/nonexistent/me", "TMPDIR": str(tmp_path)}
    environment.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == f"False {tmp_path}/pali-caches-{os.getuid()}/triton/cache\n"
