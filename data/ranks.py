"""Join the processes that make one corpus: those of mpirun or srun, by MPI, or this one alone."""

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from common.errors import ConfigurationError
from common.launcher import ScriptOfTasks, this_process

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


class Ranks:
    """Hold this process's `rank` and the number of ranks. As a context: an error of one rank ends all of them."""

    def __init__(self, world: "MPI.Intracomm | None" = None) -> None:
        self.world = world
        self.rank, self.size = (world.Get_rank(), world.Get_size()) if world else (0, 1)

    def on_first(self, work: Callable[[], T]) -> T:
        """Call `work` on rank 0 after a barrier; return its result, or raise its ConfigurationError, on all ranks."""
        if self.world is None:
            return work()
        self.world.Barrier()
        done: tuple[T | None, str | None] = (None, None)
        if self.rank == 0:
            try:
                done = work(), None
            except ConfigurationError as error:
                done = None, str(error)
        result, mistake = self.world.bcast(done)
        if mistake is not None:
            raise ConfigurationError(mistake)
        return result  # type: ignore[return-value]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world is not None and error is not None and not isinstance(error, ConfigurationError):
            traceback.print_exception(error)
            self.world.Abort(1)


def ranks() -> Ranks:
    """Return the processes that were started together. Raises ConfigurationError if MPI sees another number."""
    try:
        here = this_process()
    except ScriptOfTasks:
        return Ranks()  # a job's script makes a corpus by itself
    if here.world_size == 1:
        return Ranks()
    if here.launcher == "torchrun":
        raise ConfigurationError("A corpus is made by one process or by ranks of MPI; start it with mpirun or srun.")
    if here.launcher == "srun":
        _send_short_addresses()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigurationError(
            f"{here.launcher} started {here.world_size} processes, but mpi4py cannot be used ({error}); "
            'pip install ".[mpi]", or start one process.'
        ) from error
    if MPI.COMM_WORLD.Get_size() != here.world_size:
        how = (
            "srun and the MPI library use different protocols, so give srun --mpi=pmi2 (MPICH, Intel MPI) or "
            "--mpi=pmix (Open MPI); `srun --mpi=list` shows which there are"
            if here.launcher == "srun"
            else "mpi4py loads another MPI than mpirun's, so use the mpirun beside your python or set MPI4PY_MPIABI"
        )
        raise ConfigurationError(
            f"MPI's size is {MPI.COMM_WORLD.Get_size()} in a world of {here.world_size} processes: {how}."
        )
    return Ranks(MPI.COMM_WORLD)


def _send_short_addresses() -> None:
    """Let the MPICH of PyPI exchange addresses of libfabric, which Slurm reads whole, and not those of UCX.

    Slurm's pmi2 plugin takes the first 1,024 bytes of a request for all of it (handle_pmi1_cmd of its pmi1.c). It then
    prints "value not properly terminated in client request". MPICH 5.0.2 sends a UCX address in nine requests, filled
    up with memory of any content. Zeros are abbreviated, so a request has 500 to 1,100 characters. libfabric's is one
    of 88.
    """
    with suppress(metadata.PackageNotFoundError):  # another MPICH may have been built without libfabric
        metadata.version("mpich")
        os.environ.setdefault("MPIR_CVAR_CH4_NETMOD", "ofi")
