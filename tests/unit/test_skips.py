"""The last line of pytest counts skipped tests by reason, with and without worker processes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

def test_here() -> None:
    pass

@pytest.mark.parametrize("number", [1, 2])
def test_elsewhere(number: int) -> None:
    pytest.skip("no slurmctld: as root, `make slurm`")

@pytest.mark.skipif(True, reason="no CUDA device")
def test_of_gpus() -> None:
    pass
"""


def last_line(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_some.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.rstrip().splitlines()[-1]


def test_skips_are_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_bytes((ROOT / "tests" / "conftest.py").read_bytes())
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    printed = "NOT TESTED on this machine: 2 x no slurmctld: as root, `make slurm`; 1 x no CUDA device"
    assert last_line(tmp_path) == last_line(tmp_path, "--numprocesses=1") == printed
    assert "NOT TESTED" not in last_line(tmp_path, "-k", "test_here")
