"""Find the launcher of this process (torchrun, mpirun, srun or none), its rank and its number of peers.

Only the launchers' variables are read. Torch is not needed, because corpus builders use this module too.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import ConfigurationError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MPIRUN = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH and Intel MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
PAUSES_S = (1, 2, 4, 8, 15, 30, 60)  # before each retry of a command that Slurm's controller did not answer
CONTROLLER_ERRORS = ("Unable to contact", "timed out", "Connection refused", "Connection reset", "No route to host",
                 "Zero Bytes were transmitted", "emporarily un", "Communication connection failure",
                 "Transport endpoint", "not responding")  # fmt: skip
RESERVED_STEPS = 0xFFFFFFF0  # Slurm's ids of the batch script, an interactive shell, ...; srun's steps are below


class ScriptOfTasks(ConfigurationError):
    """This process is the batch script or interactive shell of a Slurm job of several tasks, not one of the tasks."""


@dataclass(frozen=True)
class Process:
    """Hold the rank of this process among its peers; `local_rank` of `local_world_size` counts within the machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Return the rank and peers of this process, from its launcher's variables.

    torchrun and mpirun come before srun, which may itself have started them. Raises ConfigurationError where variables
    contradict each other, and in a job script that was not started as one of the job's tasks.
    """
    if "RANK" in environment:
        found = _read(environment, "torchrun", TORCHRUN)
        _check_stale(environment, found)
        return found
    for names in MPIRUN:
        if all(name in environment for name in names[:3]):
            return _read(environment, "mpirun", names)
    if in_step(environment):
        return _srun(environment)
    _check_incomplete(environment)
    tasks = _integer(environment, "SLURM_NTASKS", _integer(environment, "SLURM_NNODES", 1))
    if "SLURM_JOB_ID" in environment and tasks > 1:
        raise ScriptOfTasks(
            f"This is the script of a Slurm job of {tasks} tasks, not one of its tasks; start them with "
            "`srun python -m …` (or one alone with `srun --ntasks=1 --nodes=1 python -m …`)."
        )
    return Process()


def is_main_rank() -> bool:
    """Return whether this process has rank 0; true in every process if the launcher's variables show no peers."""
    try:
        return this_process().rank == 0 or {"RANK", "MASTER_ADDR"} & set(os.environ) == {"RANK"}
    except ConfigurationError:
        return True


def in_step(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether srun started this process as a task; false in a job's script and in an interactive shell."""
    return "SLURM_PROCID" in environment and 0 <= _integer(environment, "SLURM_STEP_ID", -1) < RESERVED_STEPS


def first_host(nodes: str) -> str:
    """Return the first of Slurm's list of nodes: n03 of `n[03-05,9],m1`."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    assert first is not None
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0])


def is_of_controller(message: str) -> bool:
    """Return whether an error of Slurm is a temporary one of its controller or the network, not of the request."""
    return any(sign in message for sign in CONTROLLER_ERRORS)


def _srun(environment: Mapping[str, str]) -> Process:
    size = _integer(environment, "SLURM_STEP_NUM_TASKS", _integer(environment, "SLURM_NTASKS", 1))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts = [
        int(count)
        for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node)
        for _ in range(int(repeated or 1))
    ]
    node, rank = _integer(environment, "SLURM_NODEID", 0), _integer(environment, "SLURM_PROCID", 0)
    if not 0 <= rank < size:
        raise ConfigurationError(_contradiction("SLURM_PROCID", rank, "SLURM_STEP_NUM_TASKS", size, "srun"))
    return Process(
        rank,
        size,
        _integer(environment, "SLURM_LOCALID", 0),
        counts[node] if node < len(counts) else 1,
        "srun",
    )


def _read(environment: Mapping[str, str], launcher: str, names: tuple[str, str, str, str]) -> Process:
    if missing := [name for name in names[:2] if name not in environment]:
        raise ConfigurationError(_one_without(names[0], missing))
    rank, size = _integer(environment, names[0], 0), _integer(environment, names[1], 1)
    local_rank = _integer(environment, names[2], 0)
    local_size = _integer(environment, names[3], local_rank + 1)
    for count, name, of, most in ((rank, names[0], size, names[1]), (local_rank, names[2], local_size, names[3])):
        if not 0 <= count < of:
            raise ConfigurationError(_contradiction(name, count, most, of, launcher))
    return Process(rank, size, local_rank, local_size, launcher)


def _contradiction(name: str, rank: int, of: str, size: int, launcher: str) -> str:
    return (
        f"{name}={rank} and {of}={size} in the environment contradict each other (ranks count from 0); unset them, or "
        f"start the ranks with {launcher}."
    )


def _one_without(name: str, missing: list[str]) -> str:
    return (
        f"{name} is set but {', '.join(missing)} not; unset it to start one process, or start the ranks with torchrun, "
        "srun or mpirun."
    )


def _check_incomplete(environment: Mapping[str, str]) -> None:
    """Raise ConfigurationError for half-set variables: without their rank, all processes would train alone."""
    for names in (TORCHRUN, *MPIRUN):
        given = [name for name in names[:2] if name in environment]
        if given and _integer(environment, names[1], 0) != 1:
            raise ConfigurationError(_one_without(given[0], [name for name in names[:3] if name not in environment]))


def _check_stale(environment: Mapping[str, str], found: Process) -> None:
    """Raise ConfigurationError for an inherited RANK: every task of the srun step would have the same rank."""
    if "TORCHELASTIC_RUN_ID" in environment or not in_step(environment):
        return
    task = _srun(environment)
    if task.world_size > 1 and (task.rank, task.world_size) != (found.rank, found.world_size):
        raise ConfigurationError(
            f"RANK={found.rank} and WORLD_SIZE={found.world_size} are set in task {task.rank} of {task.world_size} of "
            "an srun step; unset them (srun's own variables are read), or start torchrun in the step."
        )


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name, "")
    if value == "":
        return default
    try:
        return int(value)
    except ValueError:
        raise ConfigurationError(f"{name}={value!r} in the environment is not a number; unset or correct it.") from None
