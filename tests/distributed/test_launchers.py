"""Ranks that mpirun starts find each other: MPI gives the address, and a collective of torch proves it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
SUM_OF_RANKS = """
import os, torch, torch.distributed as dist
from parallel.distributed import launch, start, stop
this = launch()
start(this, timeout_s=60)
total = torch.tensor([this.rank + 1.0])
dist.all_reduce(total)
numbers = this.launcher, this.rank, this.world_size, this.local_rank, this.local_world_size, total.item()
os.write(1, (" ".join(map(str, numbers)) + chr(10)).encode())  # in one piece: two ranks share the pipe
stop()
"""


def clean_environment() -> dict[str, str]:
    """Without what another launcher may have left, so that the tests may themselves run in a job."""
    mine = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "PMI", "OMPI_", "GLOO_SOCKET_IFNAME")
    return {k: v for k, v in os.environ.items() if not k.startswith(mine)} | {"PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this python: pip install mpich")
def test_mpirun() -> None:
    done = subprocess.run(
        [MPIRUN, "-np", "2", sys.executable, "-c", SUM_OF_RANKS],
        env=clean_environment(), capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["mpirun 0 2 0 2 3.0", "mpirun 1 2 1 2 3.0"]


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this python: pip install mpich")
def test_an_mpi_that_is_not_mpiruns_is_one_sentence() -> None:
    """mpirun counts two processes, and each process's MPI counts one: without a word both would start at rank 0."""
    found = clean_environment() | {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SUM_OF_RANKS], env=found, capture_output=True, encoding="utf-8", timeout=120
    )
    assert "ConfigurationError: mpirun started 2 processes, but mpi4py sees 1" in done.stderr
