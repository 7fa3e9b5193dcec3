"""Checkpoints that any layout can read: logical names and shapes, fp32 weights; a crash cannot harm the last good one.

A step is held up only while its state is copied to host memory; a thread of each rank writes the copies, and meets the
threads of other ranks in a group of its own (`Layout.background_group`).

checkpoints/
    latest                  the name of the newest whole checkpoint, for people and scripts; what counts are the folders
    step_00000100/          PyTorch DCP files, manifest.json (size and SHA-256 of each), state.json (step, ages, ...)
    step_00000200.partial/  being written, or left by a crash
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.errors import OF_STORAGE, ConfigurationError, Notice, StorageFailed
from common.progress import beat
from model.finite import first_not_finite
from model.layers import parameter_parts
from parallel.checkpoint.dcp_tensor import logical_tensors
from parallel.checkpoint.folder import CheckpointFolder, raise_if_of_storage, write_json
from parallel.checkpoint.host_buffer import Staging
from parallel.engine.base import Engine
from parallel.layout import Layout
from parallel.shards import Rectangle

T = TypeVar("T")
Piece = tuple[str, Rectangle | torch.Size, Tensor]  # name, where it lies or the shape of what every rank holds, values

SIGN_OF_LIFE_S = 1.0  # while a save is waited for
LISTINGS = 5  # how often a folder is looked at anew whose run removes the checkpoint that is being read


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, the same on every rank; the message is one sentence."""


class SaveStalled(SaveFailed):
    """A checkpoint could not be written because its storage failed, which often passes."""


class NotFinite(SaveFailed):
    """A checkpoint was not written, because a number in it is not finite."""


class _Pruned(Exception):
    """The checkpoint that was being read is gone, and others are there."""


class Checkpointer(CheckpointFolder):
    """Saves and loads an engine's whole state in one folder.

    The newest `keep_last` trusted checkpoints stay, and those whose step is a multiple of `keep_every` (0 = none).
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int = 0) -> None:
        super().__init__(folder, keep_last, keep_every)
        self.staging, self.thread = Staging(), ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(self, engine: Engine, step: int, extra: dict[str, Any], trusted: bool = True) -> None:
        """Copy the state of `step`, and write it while training goes on; `extra` is anything JSON can hold.

        One that is not `trusted` removes no other, and is not counted among `keep_last`. Waits for the save before it,
        and raises SaveFailed if that one failed. A collective of all ranks.
        """
        self.wait()
        pieces = _pieces(engine, optimizer=True)
        copies = self.staging.copy([values for *_, values in pieces])
        state = _state([(name, where, copy) for (name, where, _), copy in zip(pieces, copies, strict=True)])
        frozen = [part.name for p, part in parameter_parts(engine.blueprint.plan) if not p.requires_grad]
        content = {"step": step, "extra": extra, "frozen": frozen, "ages": dict(engine.optimizer.ages)}
        content["trusted"] = trusted
        named = [(name, copy) for (name, *_), copy in zip(pieces, copies, strict=True)]
        self.writing = self.thread.submit(self._write, state, named, content, engine.layout.background_group)

    @property
    def failed(self) -> bool:
        """Whether this rank knows already that the last save failed; `wait` says why."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Until the last save is whole on disk; raises SaveFailed, once and on every rank, if it will never be.

        Another RuntimeError is the group's: a rank has died.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            while not wait([writing], timeout=SIGN_OF_LIFE_S).done:  # a peer that died is found by the writer's group
                beat(f"waiting for a checkpoint in {self.folder}")
            writing.result()

    def _write(
        self,
        state: dict[str, Tensor],
        named: list[tuple[str, Tensor]],
        content: dict[str, Any],
        group: dist.ProcessGroup,
    ) -> None:
        if (found := _anywhere(first_not_finite(named), group)) is not None:
            raise NotFinite(self._not_finite(content["step"], found))
        name, rank = f"step_{content['step']:08d}", group.rank()
        partial = self.folder / f"{name}.partial"

        def prepare() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def write() -> None:
            writer = dcp.FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)  # it is on the host
            dcp.save(state, storage_writer=writer, process_group=group)
            files = {f.name: _checksum(f) for f in partial.glob(f"__{rank}_*")}
            write_json(partial / f"rank_{rank}.json", {"files": files, "ages": content["ages"]})

        def publish() -> None:
            self._publish(partial, name, content, group.size())
            if content["trusted"]:
                self.prune()

        try:
            _together(group, prepare if rank == 0 else _nothing)
            _together(group, write)
            _together(group, publish if rank == 0 else _nothing)
        except SaveFailed as error:  # not of the group: a peer that died ends the run as everywhere else
            shutil.rmtree(partial, ignore_errors=True)
            raise type(error)(
                f"The checkpoint of step {content['step']} could not be written to {self.folder} ({_one_line(error)}; "
                f"{_room(self.folder)}); mend that and start the same command again: it goes on from "
                "the checkpoint before."
            ) from error

    def _publish(self, partial: Path, name: str, content: dict[str, Any], world_size: int) -> None:
        """Join what the ranks wrote (a pipeline stage knows the ages of its own tensors only) and move `latest`."""
        manifest, ages = {".metadata": _checksum(partial / ".metadata")}, {}
        for rank in range(world_size):
            left = partial / f"rank_{rank}.json"
            of_rank = json.loads(left.read_text(encoding="utf-8"))
            manifest.update(of_rank["files"])
            ages.update(of_rank["ages"])
            left.unlink()
        write_json(partial / "state.json", content | {"ages": ages})
        manifest["state.json"] = _checksum(partial / "state.json")
        write_json(partial / "manifest.json", manifest)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(partial, self.folder / name)
        self.write_latest(self.latest_step())

    def _not_finite(self, step: int, name: str) -> str:
        kept = self.latest_step()
        stays = "there is none before it" if kept is None else f"that of step {kept} stays the newest"
        return (
            f"The checkpoint of step {step} is not written to {self.folder}, because {name} is not finite ({stays}); "
            "give a lower schedule.peak, or optimizer.gradient_clipping, and start again."
        )

    def load_latest(self, engine: Engine, weights_only: bool = False) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint, whatever layout wrote it; returns its step and `extra`, or None.

        A file that is cut short or altered is reported by a warning, the checkpoint before is taken, and the damaged
        one is put aside (`step_*.damaged`). `weights_only` leaves the optimizer, and the folder, as they are. Position
        embeddings of another resolution are resampled. Waits for a save that is being written. Raises
        ConfigurationError where the checkpoint is of another model, and where all are damaged: to start anew, and
        write over what is left, must be asked for. A collective of all ranks.
        """
        self.wait()
        for _ in range(LISTINGS):
            try:
                return self._load_newest(engine, weights_only)
            except _Pruned as pruned:  # by the run, which trains on while its checkpoints are read
                last = pruned
        raise ConfigurationError(f"{last.args[0]} was removed while it was read; start again when the run has ended.")

    def _load_newest(self, engine: Engine, weights_only: bool) -> tuple[int, dict[str, Any]] | None:
        layout = engine.layout
        steps = layout.broadcast_from_main(self.steps)
        for step in reversed(steps):
            path, broken, mistake = self.path(step), None, None
            try:
                broken = _broken_file(path, layout)
            except StorageFailed as error:
                mistake = str(error)
            self._raise_if_unreadable(mistake, path, layout)
            if not layout.any_rank(broken is not None):
                try:
                    return self._load(engine, path, weights_only)
                except CheckpointException as error:  # of some rank, raised by DCP on all
                    self._raise_if_unreadable(f"{path} could not be read ({_one_line(error)}).", path, layout)
            self._raise_if_pruned(path, layout)
            if broken is not None:
                then = "; taking the one before it" * (step > steps[0])
                warnings.warn(f"checkpoint {path} is damaged ({broken}){then}", Notice, stacklevel=2)
            if layout.rank == 0 and not weights_only:
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                os.replace(path, path.with_suffix(".damaged"))
                self.write_latest(self.latest_step())
        if steps:
            raise ConfigurationError(
                f"All checkpoints in {self.folder} are damaged (steps {', '.join(map(str, steps))}); bring one back "
                "from a copy, or choose another run.folder to start anew."
            )
        return None

    def _read(self, path: Path, layout: Layout) -> tuple[Metadata, dict[str, Any]]:
        """What is in the checkpoint, and `state.json`; fails on every rank where it fails on one."""
        mistake: str | None = None
        try:
            saved: Metadata = dcp.FileSystemReader(path).read_metadata()
            content: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except OSError as error:
            mistake = f"{path} could not be read ({error})."
        self._raise_if_unreadable(mistake, path, layout)
        return saved, content

    def _raise_if_unreadable(self, mistake: str | None, path: Path, layout: Layout) -> None:
        """Raise StorageFailed on every rank where the disk of one has failed."""
        if (found := _anywhere(mistake)) is not None:
            self._raise_if_pruned(path, layout)
            failed = StorageFailed(found)
            failed.alone = False
            raise failed

    def _raise_if_pruned(self, path: Path, layout: Layout) -> None:
        if layout.broadcast_from_main(lambda: not path.exists() and bool(self.steps())):
            raise _Pruned(path)

    def _load(self, engine: Engine, path: Path, weights_only: bool) -> tuple[int, dict[str, Any]]:
        saved, content = self._read(path, engine.layout)
        state = _state(_pieces(engine, optimizer=not weights_only))
        shapes = {name: v.size for name, v in saved.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        wanted = {name: tensor for name, tensor in state.items() if shapes.get(name) == tensor.shape}
        parts = {f"weights/{part.name}": part for _, part in parameter_parts(engine.blueprint.plan)}
        others = [name for name in state if name in parts and name not in wanted]
        resampled = {name: torch.empty(shapes[name]) for name in others if parts[name].fits(shapes.get(name))}
        different = next((name for name in others if name not in resampled), None)
        _raise_anywhere(
            different
            and f"{path} is a checkpoint of another model: {different.removeprefix('weights/')} is "
            f"{_shape(shapes.get(different))} there and {_shape(state[different].shape)} here; give the same vit and "
            "mt5, or another run.folder."
        )
        surplus = next((name for name in shapes if name.startswith("weights/") and name not in parts), None)
        if surplus is not None:  # the same on every rank
            raise ConfigurationError(
                f"{path} is a checkpoint of another model: {surplus.removeprefix('weights/')} is missing here; give "
                "the same vit and mt5, or another run.folder."
            )
        dcp.load(wanted | resampled, storage_reader=dcp.FileSystemReader(path), planner=_Planner())
        for r, values in engine.held_weights():
            if (stored := resampled.get(f"weights/{r.name}")) is not None:
                values.copy_(parts[f"weights/{r.name}"].resampled(stored)[r.slices])
        engine.publish()
        if not weights_only:
            ages = content["ages"]
            engine.optimizer.ages.update({name: ages.get(name, 0) for name in engine.optimizer.ages})
        return content["step"], content["extra"]


class _Planner(dcp.DefaultLoadPlanner):
    """Says how far reading has come."""

    def resolve_tensor(self, read_item: dcp.planner.ReadItem) -> Tensor:
        beat(f"reading {read_item.dest_index.fqn}")
        return super().resolve_tensor(read_item)


def _pieces(engine: Engine, optimizer: bool) -> list[Piece]:
    """Everything that is saved; the values share the engine's memory, so loading fills them."""
    pieces: list[Piece] = [(f"weights/{r.name}", r, values) for r, values in engine.held_weights()]
    if optimizer:
        pieces += [(f"optimizer/{name}", where, values) for name, where, values in engine.optimizer.state_pieces()]
    return pieces


def _state(pieces: list[Piece]) -> dict[str, Tensor]:
    """As DCP takes it: by logical name."""
    divided = [(name, where, values) for name, where, values in pieces if isinstance(where, Rectangle)]
    whole = {name: values for name, where, values in pieces if not isinstance(where, Rectangle)}
    return {**logical_tensors(divided), **whole}


def _together(group: dist.ProcessGroup, work: Callable[[], None]) -> None:
    """Do `work` on every rank, and wait for all of them; what went wrong on one is raised on each."""
    mistake: tuple[str, bool] | None = None
    try:
        work()
    except CheckpointException as error:  # of some rank, known to all
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        mistake = f"rank {rank}: {cause}", _is_of_storage(cause)
    except Exception as error:  # whatever it is, the others must not wait for this rank
        mistake = f"rank {group.rank()}: {error}", _is_of_storage(error)
    if (found := _anywhere(mistake, group)) is not None:
        text, may_pass = found
        raise (SaveStalled if may_pass else SaveFailed)(text)


def _is_of_storage(error: BaseException) -> bool:
    return isinstance(error, StorageFailed) or (isinstance(error, OSError) and error.errno in OF_STORAGE)


def _anywhere(mistake: T | None, group: dist.ProcessGroup | None = None) -> T | None:
    """Return on every rank the mistake of the first rank that has one; a collective of the group, or of all ranks."""
    everywhere: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, mistake, group=group)
    return next(filter(None, everywhere), None)


def _room(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder if folder.exists() else "/").free
    except OSError:
        return "its disk does not answer"
    return f"{free / 2**30:.2f} GiB are free there"


def _nothing() -> None:
    pass


def _raise_anywhere(mistake: str | None) -> None:
    """Raise on every rank the ConfigurationError of the first rank that has one: stages differ in what they hold."""
    if (found := _anywhere(mistake)) is not None:
        raise ConfigurationError(found)


def _broken_file(path: Path, layout: Layout) -> str | None:
    """The name of a file of this rank's share that is missing, cut short or altered; raises StorageFailed."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise_if_of_storage(error, path)
        return "manifest.json"
    if not isinstance(manifest, dict) or not {".metadata", "state.json"} <= manifest.keys():
        return "manifest.json"
    for name in sorted(manifest)[layout.rank :: layout.world_size]:
        beat(f"checking {path / name}")
        try:
            if _checksum(path / name) != manifest[name]:
                return name
        except OSError as error:
            raise_if_of_storage(error, path)
            return name
    return None


def _checksum(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else " x ".join(map(str, size))
