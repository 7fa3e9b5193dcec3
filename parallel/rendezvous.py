"""Set the rendezvous of all ranks: the main rank's address and a port, in the variables of torch and DeepSpeed."""

import ipaddress
import re
import socket
import subprocess
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from common.errors import ConfigurationError
from common.launcher import PAUSES_S, Process, first_host, is_of_controller

PORTS = range(12_000, 32_000)  # below Linux's range of ephemeral ports, above most services


def set_rendezvous(this: Process, environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for the ranks of an srun step or of mpirun.

    Addresses that were set by hand stay. torchrun sets all variables itself. Raises ConfigurationError where the ranks
    could not find each other.
    """
    if this.launcher == "torchrun":
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise ConfigurationError(
                f"RANK is set but {', '.join(missing)} not; start the ranks with torchrun or srun."
            )
        return
    address, port = slurm_rendezvous(environment) if this.launcher == "srun" else mpi_rendezvous(this)
    environment.setdefault("MASTER_ADDR", address)
    environment.setdefault("MASTER_PORT", str(port))
    environment.update(RANK=str(this.rank), WORLD_SIZE=str(this.world_size), LOCAL_RANK=str(this.local_rank))
    if "GLOO_SOCKET_IFNAME" not in environment and not own_name_is_an_address():
        interface = interface_towards(environment["MASTER_ADDR"])
        if interface is not None:
            environment["GLOO_SOCKET_IFNAME"] = interface


def slurm_rendezvous(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return (address of the first node, port) of an srun step.

    The port differs between steps and between restarts, so that a process left over from another one is not reached.
    """
    several = int(environment.get("SLURM_STEP_NUM_NODES", 1)) > 1
    given = environment.get("MASTER_ADDR", "")
    if several and given in ("localhost", "127.0.0.1", "::1"):
        raise ConfigurationError(
            f"MASTER_ADDR={given} is another machine on each node of this step; unset it (the first node is found)."
        )
    job, step, restarts = (
        int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    )
    port = PORTS[(131 * job + 7 * restarts + step) % len(PORTS)]
    if not several:
        return "127.0.0.1", port
    node = first_host(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])
    return given or node_address(node), port


def node_address(node: str) -> str:
    """Return the node's name where it resolves, else the address that Slurm has for it.

    Name servers and Slurm's controller may be out of reach for a while, so both are tried again for two minutes.
    """
    for pause in (*PAUSES_S, None):
        with suppress(OSError):
            socket.getaddrinfo(node, None)
            return node
        answer = _scontrol_show(node)
        if found := re.search(r"NodeAddr=(\S+)", answer):
            return found[1]
        if pause is None or not is_of_controller(answer):
            break
        time.sleep(pause)
    raise ConfigurationError(f"The address of the first node, {node}, cannot be found; set MASTER_ADDR to it.")


def _scontrol_show(node: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "node", node],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
        )
    except subprocess.TimeoutExpired:
        return "timed out"
    except OSError:  # no scontrol on this machine
        return ""
    return done.stdout + done.stderr


def mpi_rendezvous(this: Process) -> tuple[str, int]:
    """Return (address, free port) of mpirun's rank 0, broadcast by MPI; a collective of all ranks."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"mpirun started {this.world_size} processes, but mpi4py cannot be used ({error}); "
            "pip install mpi4py and an MPI, or start them with torchrun."
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != this.world_size:
        raise ConfigurationError(
            f"mpirun started {this.world_size} processes, but mpi4py sees {world.Get_size()}: it was loaded with "
            "another MPI than mpirun's; set MPI4PY_MPIABI or use the mpirun beside your python."
        )
    host = socket.gethostname()
    one_host = len(set(world.allgather(host))) == 1
    point = ("127.0.0.1" if one_host else host, free_port()) if this.rank == 0 else None
    address, port = world.bcast(point)
    return str(address), int(port)


def own_name_is_an_address() -> bool:
    """Return whether this host's name resolves to an address that others can reach, where gloo listens by default."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return not any(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def interface_towards(address: str) -> str | None:
    """Return the network interface that packets to `address` leave by, e.g. "eth0"; None where none is found."""
    import psutil  # comes with DeepSpeed; only launchers without a reachable host name need it

    try:
        family, _, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            return name
    return None


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
