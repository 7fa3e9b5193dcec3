"""Rank, world, machine and rendezvous from the variables of every launcher; contradictions are one sentence."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from common.errors import ConfigurationError
from common.launcher import Process, first_host, in_step, is_main_rank, this_process
from parallel import distributed, rendezvous
from parallel.distributed import gather_objects, launch, num_threads
from parallel.rendezvous import PORTS, interface_towards, set_rendezvous, slurm_rendezvous
from tests.unit.train.ranks import Ranks

JOB = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0",
       "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-2]",
       "SLURM_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
STEP = JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
              "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
            "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "none"}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
# MPICH's mpirun starts one proxy a node through srun, whose variables the ranks inherit.
PROXY = STEP | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Process()),
        ({"WORLD_SIZE": "1"}, Process()),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Process()),
        (STEP, Process(3, 4, 1, 2, "srun")),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11"}, Process(3, 4, 1, 2, "srun")),  # srun --mpi=pmi2
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, Process(3, 4, 0, 1, "srun")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Process(0, 1, 1, 2, "srun")),  # a step of one task
        (TORCHRUN, Process(5, 8, 1, 4, "torchrun")),
        (STEP | TORCHRUN, Process(5, 8, 1, 4, "torchrun")),  # one torchrun a node, started by srun
        (
            STEP | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            Process(3, 4, 1, 2, "torchrun"),
        ),  # both agree
        (MPICH, Process(2, 4, 0, 2, "mpirun")),
        (OPEN_MPI, Process(2, 4, 0, 2, "mpirun")),
        (PROXY | MPICH, Process(2, 4, 0, 2, "mpirun")),
        (JOB | OPEN_MPI, Process(2, 4, 0, 2, "mpirun")),  # mpirun in a job's script
        (JOB | {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, Process()),  # the script of a job of one task
    ],
)
def test_places(environment: dict[str, str], expected: Process) -> None:
    assert this_process(environment) == expected
    assert vars(launch(environment)) == vars(expected)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JOB, "script of a Slurm job of 4 tasks, not one of its tasks; start them with `srun"),
        ({k: v for k, v in JOB.items() if k != "SLURM_NTASKS"}, "script of a Slurm job of 2 tasks"),
        (JOB | {"SLURM_STEP_ID": "4294967290"}, "script of a Slurm job of 4 tasks"),  # salloc's interactive shell
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0 and WORLD_SIZE=1 are set in task 3 of 4"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK='first' in the environment is not a number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 and WORLD_SIZE=2 in the environment contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 and WORLD_SIZE=2"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4"),
        (STEP | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4 and SLURM_STEP_NUM_TASKS=4"),
        ({"RANK": "3"}, "RANK is set but WORLD_SIZE not; unset it"),
        ({"RANK": ""}, "RANK is set but WORLD_SIZE not; unset it"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set but RANK, LOCAL_RANK not"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' in the environment is not a number"),
        (MPICH | {"PMI_RANK": "4"}, "PMI_RANK=4 and PMI_SIZE=4"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "OMPI_COMM_WORLD_LOCAL_RANK=2 and .*LOCAL_SIZE=2"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "PMI_RANK is set but MPI_LOCALRANKID not"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK is set but OMPI_COMM_WORLD_SIZE, .*LOCAL_RANK not"),
    ],
)
def test_contradictions(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        this_process(environment)


def test_the_main_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_main_rank()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)
    assert not is_main_rank()
    monkeypatch.delenv("MASTER_ADDR")  # stale: nobody else may be there to print
    assert is_main_rank()
    monkeypatch.setenv("RANK", "first")
    assert is_main_rank()


@pytest.mark.parametrize(
    ("gpus", "local_rank", "device"),
    [(0, 3, "cpu"), (1, 0, "cuda:0"), (1, 3, "cuda:0"), (2, 0, "cuda:0"), (2, 1, "cuda:1"), (8, 7, "cuda:7")],
)
def test_the_device_of_a_rank(gpus: int, local_rank: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher shows a rank all GPUs of its machine, or only its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(launch(TORCHRUN | {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "8"}).device) == device


@pytest.mark.parametrize("local_rank", [2, 3])
def test_more_ranks_than_gpus(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=f"{local_rank + 1} or more processes on this machine share 2 GPUs"):
        _ = launch(TORCHRUN | {"LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": "8"}).device


def test_ranks_that_see_the_gpus_of_one_socket_take_one_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm deals tasks to sockets in turn -> local ranks 0, 2, 4 and 6 see the same four GPUs."""
    monkeypatch.setattr(distributed, "CLAIMS", tmp_path)
    monkeypatch.setattr(distributed, "_claims", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    taken: dict[int, list[str]] = {0: [], 1: []}
    eight = STEP | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}
    for local_rank in range(10):
        socket_number = local_rank % 2
        uuids = [SimpleNamespace(uuid=f"{socket_number}-{index}") for index in range(4)]
        monkeypatch.setattr(torch.cuda, "get_device_properties", uuids.__getitem__)
        distributed.claim_gpu.cache_clear()  # each rank is a process
        rank = launch(eight | {"SLURM_PROCID": str(min(local_rank, 7)), "SLURM_LOCALID": str(local_rank)})
        if local_rank >= 8:
            with pytest.raises(ConfigurationError, match="processes on this machine share 4 GPUs"):
                _ = rank.device
        else:
            taken[socket_number] += [str(rank.device), str(rank.device)]
    assert taken[0] == taken[1] == [f"cuda:{index}" for index in (0, 0, 1, 1, 2, 2, 3, 3)]


@pytest.mark.parametrize(
    ("given", "in_order", "added"),
    [
        ({}, False, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_FR_BUFFER_SIZE": "2000"}),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512", "TORCH_NCCL_TRACE_BUFFER_SIZE": "9"},
            True,
            {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        ),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "", "TORCH_FR_BUFFER_SIZE": "0"}, True, {}),
    ],
)
def test_variables_of_gpus_that_nobody_has_set(given: dict[str, str], in_order: bool, added: dict[str, str]) -> None:
    environment = dict(given)
    distributed.set_gpu_variables(environment, in_order)
    assert environment == given | added


def test_steps() -> None:
    assert in_step(STEP) and not in_step(JOB) and not in_step(JOB | {"SLURM_STEP_ID": "4294967290"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[0007,0009-0012],cpu3", "gpu-0007"),
        ("a,b[1-2]", "a"),
        ("rack[2-3]node[05-06]", "rack2node05"),
    ],
)
def test_first_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def started(environment: Mapping[str, str]) -> dict[str, str]:
    result = dict(environment)
    set_rendezvous(this_process(result), result)
    return result


def test_the_started_a_step_is_its_first_node() -> None:
    here = STEP | {"SLURM_STEP_NODELIST": f"{socket.gethostname()},n2"}
    found = started(here)
    assert found["MASTER_ADDR"] == socket.gethostname() and int(found["MASTER_PORT"]) in PORTS
    assert [found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]
    assert started(here) == found
    others = [
        started(here | {name: "7"})["MASTER_PORT"] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    ]
    assert len({found["MASTER_PORT"], *others}) == 4


def test_one_node_uses_the_loop_back() -> None:
    assert started(STEP | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"


def test_what_was_set_by_hand_stays() -> None:
    found = started(STEP | {"MASTER_ADDR": "n9", "MASTER_PORT": "5555", "GLOO_SOCKET_IFNAME": "ib0"})
    assert [found[n] for n in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")] == ["n9", "5555", "ib0"]


@pytest.mark.parametrize(
    ("reachable", "interface", "message"),
    [(True, "eth7", None), (False, "eth7", "eth7"), (False, None, None)],
)
def test_gloo_gets_an_interface_where_the_own_name_leads_to_the_loop_back(
    reachable: bool, interface: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    towards: list[str] = []

    def found(address: str) -> str | None:
        towards.append(address)
        return interface

    monkeypatch.setattr(rendezvous, "own_name_is_an_address", lambda: reachable)
    monkeypatch.setattr(rendezvous, "interface_towards", found)
    assert started(STEP | {"MASTER_ADDR": "n9"}).get("GLOO_SOCKET_IFNAME") == message
    assert towards == [] if reachable else ["n9"]


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.0.0.7"], True),
        (["10.0.0.7", "fe80::1"], True),
        (["127.0.1.1"], False),  # Debian's entry for the own name
        (["10.0.0.7", "127.0.1.1"], False),
        (["::1"], False),
        (None, False),  # a name without an address
    ],
)
def test_own_names(addresses: list[str] | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(name: str, port: None) -> list[tuple[Any, ...]]:
        assert name == socket.gethostname()
        if addresses is None:
            raise OSError
        return [(socket.AF_INET, 1, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert rendezvous.own_name_is_an_address() == expected


def test_a_node_that_only_slurm_resolves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "--oneliner show node n1" ] && echo "NodeName=n1 NodeAddr=10.0.0.7 Port=1"\n',
        encoding="utf-8",
    )
    scontrol.chmod(0o755)
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rendezvous.node_address("n1") == "10.0.0.7"
    with pytest.raises(ConfigurationError, match="The address of the first node, n2, cannot be found"):
        rendezvous.node_address("n2")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(return_value=[]))
    assert rendezvous.node_address("n1") == "n1"


def test_a_busy_controller_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code 2 would end the job for good."""
    answers = [
        "Unable to contact slurm controller (connect failure)",
        "Socket timed out",
        "NodeName=n1 NodeAddr=10.0.0.7",
    ]
    slept: list[float] = []
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError))
    monkeypatch.setattr(rendezvous, "_scontrol_show", lambda node: answers.pop(0))
    monkeypatch.setattr(rendezvous.time, "sleep", slept.append)
    assert rendezvous.node_address("n1") == "10.0.0.7" and slept == [1, 2]
    monkeypatch.setattr(rendezvous, "_scontrol_show", lambda node: "Unable to contact slurm controller")
    with pytest.raises(ConfigurationError, match="n1, cannot be found"):
        rendezvous.node_address("n1")


def test_torchrun_sets_its_own_rendezvous() -> None:
    assert started(TORCHRUN) == TORCHRUN


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            STEP | {"MASTER_ADDR": "localhost"},
            "MASTER_ADDR=localhost is another machine on each node",
        ),
        (
            STEP | {"SLURM_STEP_NODELIST": "no-such-host[1-2]"},
            "no-such-host1, cannot be found; set MASTER_ADDR",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set but MASTER_ADDR, MASTER_PORT not"),
    ],
)
def test_no_rendezvous(environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no scontrol to ask
    with pytest.raises(ConfigurationError, match=message):
        set_rendezvous(this_process(environment), dict(environment))


def test_localhost_is_fine_on_one_node() -> None:
    assert slurm_rendezvous(STEP | {"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "localhost"})


def test_interfaces() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


@pytest.mark.parametrize(
    ("environment", "allowed", "expected"),
    [
        ({}, 16, 4),  # a share of the machine
        ({}, 6, 6),  # bound by the launcher
        ({"SLURM_CPUS_PER_TASK": "8"}, 16, 8),
        ({"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "2"}, 16, 2),
    ],
)
def test_threads(environment: dict[str, str], allowed: int, expected: int) -> None:
    assert num_threads(Process(1, 8, 1, 4), environment, allowed, 16) == expected


def test_a_rank_whose_peers_do_not_come_reports_where_it_waits() -> None:
    code = "from parallel import distributed; distributed.NOTICE_S = 0.2; distributed.start(distributed.launch(), 1.0)"
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | alone, capture_output=True, encoding="utf-8", timeout=200
    )
    assert "Rank 1 of 2 still waits for the others at 127.0.0.1:1; if none were started, unset RANK" in done.stderr
    assert "PeersMissing: Rank 1 of 2 waited 1 s at 127.0.0.1:1 and not all others came" in done.stderr


def test_gathered_objects_are_in_order_of_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Ranks(3, monkeypatch).run(lambda rank: gather_objects([rank] * rank)) == [[1, 2, 2]] * 3
