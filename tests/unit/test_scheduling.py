"""Tests that share a fixture run in one worker."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

TESTS = """
import os
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", range(3))
def test_name_of_the_worker(number: int) -> None:
    with (Path(__file__).parents[1] / "workers").open("a") as file:
        file.write(f"{Path(__file__).name} {os.environ['PYTEST_XDIST_WORKER']}\\n")
"""


def test_a_file_of_distributed_and_all_of_slurm_run_in_one_worker_each(tmp_path: Path) -> None:
    """In a folder with the project's `tests/conftest.py` alone, so that nothing but pytest is imported."""
    conftest = Path(__file__).parents[1] / "conftest.py"
    for name in (
        "distributed/test_first.py",
        "distributed/test_second.py",
        "slurm/test_third.py",
        "slurm/test_last.py",
    ):
        file = tmp_path / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TESTS, encoding="utf-8")
    (tmp_path / "tests" / "conftest.py").write_bytes(conftest.read_bytes())
    command = [sys.executable, "-m", "pytest", "-q", "tests", "--numprocesses", "2", "--dist", "loadfile"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout
    workers = defaultdict(set)
    for line in (tmp_path / "tests" / "workers").read_text(encoding="utf-8").splitlines():
        name, worker = line.split()
        workers[name].add(worker)
    assert {name: len(found) for name, found in workers.items()} == dict.fromkeys(workers, 1) and len(workers) == 4
    assert workers["test_third.py"] == workers["test_last.py"]
