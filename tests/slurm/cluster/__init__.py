"""Start, break and query the cluster of the tests."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where daemons are, which users need not have in theirs
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ss")
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


def needs_slurm() -> None:
    """Skip where Slurm is not installed, with the command that installs it."""
    if MISSING:
        pytest.skip(f"no {', '.join(MISSING)}: as root, `make slurm`")


def clear_of_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run in a job: nothing of it may reach the cluster's jobs."""
    mine = ("SLURM_", "SBATCH_", "SRUN_", "PMI", "OMPI_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
    for name in [name for name in os.environ if name.startswith(mine)]:
        monkeypatch.delenv(name)


class Cluster:
    """Nodes n1 … n4 of 4 cores; partition `urgent` preempts `main`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        script("up.sh", self.folder, free_port())

    def stop(self) -> None:
        script("down.sh", self.folder)

    def kill_node(self, node: str) -> None:
        """Cut the node's power, and mark it as down at once instead of after Slurm's time-out."""
        script("kill_node.sh", self.folder, node)
        call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def start_node(self, node: str) -> None:
        script("start_node.sh", self.folder, node)


def show(job: str) -> dict[str, str]:
    """Return Slurm's record of a job."""
    return dict(word.split("=", 1) for word in call("scontrol", "-o", "show", "job", job).split() if "=" in word)


def wait_for(job: str, *states: str, seconds: float = 300) -> dict[str, str]:
    """Wait until the job is in one of the states (none given: until it has ended); return Slurm's record of it."""
    end = time.monotonic() + seconds
    while (found := show(job))["JobState"] not in (states or ENDED):
        assert time.monotonic() < end, f"job {job} is {found['JobState']} after {seconds} s: {found}"
        time.sleep(0.1)
    return found


def call(*command: object) -> str:
    """Return a command's output, which is in the error if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def script(name: str, *arguments: object) -> str:
    return call("bash", HERE / name, *arguments)


def free_port() -> int:
    """The first of five consecutive ports, one for each daemon."""
    for port in range(20_000 + os.getpid() % 1_000 * 8, 32_000, 8):
        if all(_is_free(port + offset) for offset in range(5)):
            return port
    raise RuntimeError("no five free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
