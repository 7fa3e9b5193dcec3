"""Where every node has a network of its own, ranks can reach each other only at the first node's address."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from slurm.code_snapshot import ROOT
from tests.slurm.cluster import HERE, call, needs_slurm

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SUM_OF_RANKS = """
import torch, torch.distributed as dist
from parallel.distributed import launch, start, stop
this = launch()
start(this, timeout_s=120)
total = torch.tensor([this.rank + 1.0])
dist.all_reduce(total)
print(this.launcher, this.rank, this.local_rank, total.item(), flush=True)
stop()
"""


@pytest.fixture(scope="module")
def run(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command on the login node of a cluster in namespaces."""
    needs_slurm()
    missing = [name for name in ("ip", "unshare", "nsenter", "sysctl") if not shutil.which(name)]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"network namespaces need root and {', '.join(missing) or 'nothing else'}")
    if subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode:
        pytest.skip("this machine does not allow network namespaces")
    folder = tmp_path_factory.mktemp("namespaces")
    script = HERE / "namespaces.sh"

    def inside(*command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", script, folder, "run", *command],
            cwd=ROOT, env=os.environ | variables, capture_output=True, encoding="utf-8", timeout=300,
        )  # fmt: skip

    try:
        call("bash", script, folder, "up")
        yield inside
    finally:
        call("bash", script, folder, "down")


def test_ranks_reach_at_the_first_node(run: Run) -> None:
    done = run("srun", "--nodes=2", "--ntasks-per-node=2", sys.executable, "-c", SUM_OF_RANKS)
    assert sorted(done.stdout.splitlines()) == [f"srun {rank} {rank % 2} 10.0" for rank in range(4)], done.stderr


def test_localhost_across_nodes_is_one_sentence(run: Run) -> None:
    """Without the check, the second node would wait for a first that is itself."""
    done = run("srun", "-K", "--nodes=2", sys.executable, "-c", SUM_OF_RANKS, MASTER_ADDR="127.0.0.1")
    assert done.returncode != 0 and "MASTER_ADDR=127.0.0.1 is another machine on each node" in done.stderr
