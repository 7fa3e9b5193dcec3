"""Write state with DCP's planner and files, in checkpoint after checkpoint, and plan it once."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from common.files import write_bytes
from parallel.checkpoint.global_plan import METADATA, describe, join_plans
from parallel.checkpoint.together import nothing, together


class StateWriter:
    """Write this rank's pieces of a state; ranks exchange plans only where the pieces of one have changed.

    What `dcp.save` does, in the same order and with the same files. It plans anew in every save, on the main rank, and
    its own cache (`enable_plan_caching`) is shared by all states of a process.
    """

    def __init__(self) -> None:
        self.own: SavePlan | None = None  # this rank's plan before the ranks have joined theirs
        self.final: SavePlan | None = None  # without pieces that another rank writes
        self.places: list[WriteResult] | None = None  # where this rank's pieces lie in its files
        # On the main rank: DCP's metadata, the pickled `places` of all ranks, the `.metadata` of the part, and of all.
        self.joined, self.everywhere, self.part, self.description = b"", list[bytes](), b"", b""

    def write(self, state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup, part: str = "") -> None:
        """Write a state into a folder; a collective of the group. Raises SaveFailed on all ranks for an error on one.

        `part` names a folder in it whose state is written already; `.metadata` lists that too.
        """
        try:
            self._write(state, folder, group, part)
        except BaseException:
            self.final = self.places = None  # ranks may have come to different points
            raise

    def _write(self, state: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup, part: str) -> None:
        is_main, planner = group.rank() == 0, DefaultSavePlanner()
        writer = FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0)  # the state is on the host already
        if any(together(group, lambda: self._plan(state, planner, writer, group.rank()))):
            self._join(group)
        moved = any(together(group, lambda: self._write_pieces(planner, writer)))
        if moved:
            self.everywhere = _gather(pickle.dumps(self.places), group)
        together(group, (lambda: self._describe(folder, part, moved)) if is_main else nothing)

    def _plan(
        self, state: Mapping[str, Tensor], planner: DefaultSavePlanner, writer: FileSystemWriter, rank: int
    ) -> bool:
        """Plan this rank's pieces; return whether the ranks have to join their plans anew."""
        writer.set_up_storage_writer(rank == 0, rank=rank)
        planner.set_up_planner(dict(state), is_coordinator=rank == 0)
        own = writer.prepare_local_plan(planner.create_local_plan())
        changed, self.own = self.final is None or own != self.own, own
        return changed

    def _join(self, group: dist.ProcessGroup) -> None:
        """Send the plans to the main rank, which joins them, and receive this rank's."""
        plans, finals = _gather(pickle.dumps(self.own), group), list[bytes]()

        def join() -> None:
            joined, self.joined = join_plans(plans)
            finals.extend(joined)

        together(group, join if group.rank() == 0 else nothing)
        received: list[Any] = [None]
        dist.scatter_object_list(received, finals or None, group=group, group_src=0)
        self.final = pickle.loads(received[0])

    def _write_pieces(self, planner: DefaultSavePlanner, writer: FileSystemWriter) -> bool:
        """Write this rank's files; return whether pieces lie elsewhere in them than last time."""
        assert self.final is not None
        places = writer.write_data(planner.finish_plan(self.final), planner).wait()
        moved, self.places = places != self.places, places
        return moved

    def _describe(self, folder: Path, part: str, moved: bool) -> None:
        """Write `.metadata`: that of last time where no piece has moved."""
        listed = (folder / part / METADATA).read_bytes() if part else b""
        if moved or listed != self.part:
            self.description, self.part = describe(self.joined, self.everywhere, listed, part), listed
        write_bytes(folder / METADATA, self.description, durable=True)


def _gather(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Return the bytes of all ranks on the main rank, an empty list on the others."""
    found: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(mine, found, group=group, group_dst=0)
    return found or []
