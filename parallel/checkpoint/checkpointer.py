"""Checkpoints that any layout can read: logical names and shapes, fp32 weights; a crash cannot harm the last good one.

A step waits only while its state is copied to host memory. A thread of each rank writes the copy; the threads
communicate over a process group of their own (`Layout.background_group`).

checkpoints/
    latest                  the name of the newest whole checkpoint, for people and scripts; loading lists the folders
    step_00000100/          PyTorch DCP files, manifest.json (size and SHA-256 of each), state.json (step, ages, ...)
        frozen/             the same of weights that are not trained; links to the files of the checkpoint before
    step_00000200.partial/  being written, or left by a crash
"""

import json
import os
import shutil
import warnings
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.errors import ConfigurationError, Notice, StorageFailed
from common.progress import beat
from model.finite import first_not_finite
from model.layers import parameter_parts
from parallel.checkpoint.dcp_tensor import average_names, logical_tensors
from parallel.checkpoint.folder import CheckpointFolder, write_json
from parallel.checkpoint.frozen_files import FOLDER as FROZEN
from parallel.checkpoint.frozen_files import FrozenFiles
from parallel.checkpoint.global_plan import METADATA
from parallel.checkpoint.host_buffer import HostBuffer
from parallel.checkpoint.manifest import broken_file, checksum
from parallel.checkpoint.state_writer import StateWriter
from parallel.checkpoint.stored_weights import Reader
from parallel.checkpoint.together import SaveFailed, anywhere, nothing, together
from parallel.engine.base import Engine
from parallel.layout import Layout
from parallel.optimizer.base import AVERAGE, StatePiece
from parallel.shards import Rectangle

BEAT_EVERY_S = 1.0  # how often waiting for a save reports progress to the watchdog
LISTINGS = 5  # how often to list the folder again if its run removes the checkpoint that is being read


class NotFinite(SaveFailed):
    """A checkpoint was not written because a number in it is not finite."""


class _Pruned(Exception):
    """The checkpoint that was being read is gone, and the folder has others."""


class Checkpointer(CheckpointFolder):
    """Save and load an engine's whole state in one folder.

    Which checkpoints are kept: see CheckpointFolder.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2, keep_every: int = 0, keep_best: int = 0) -> None:
        super().__init__(folder, keep_last, keep_every, keep_best)
        self.buffer, self.thread = HostBuffer(), ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None
        self.state_writer, self.frozen_writer = StateWriter(), StateWriter()
        self.frozen_files: FrozenFiles | None = None

    def save(self, engine: Engine, step: int, extra: dict[str, Any], trusted: bool = True) -> None:
        """Copy the state of `step`, and write it while training continues; `extra` is anything JSON can hold.

        A checkpoint that is not `trusted` removes no other, and does not count among `keep_last`. Waits for the save
        before it, and raises SaveFailed if that one failed. A collective of all ranks.
        """
        self.wait()
        names = _frozen_names(engine)
        content = {"step": step, "extra": extra, "frozen": names, "ages": dict(engine.optimizer.ages)}
        content["trusted"] = trusted
        pieces = _pieces(engine, optimizer=True)
        kept = {f"weights/{name}" for name in names}
        frozen = [piece for piece in pieces if piece.name in kept]  # not copied: nothing changes them
        changing = [piece for piece in pieces if piece.name not in kept]
        copies = self.buffer.copy([piece.values for piece in changing])
        copied = [piece._replace(values=copy) for piece, copy in zip(changing, copies, strict=True)]
        if self.frozen_files is not None and self.frozen_files.engine() is not engine:
            self.frozen_files = None
        group, owner = engine.layout.background_group, weakref.ref(engine)
        self.writing = self.thread.submit(self._write, copied, frozen, content, group, owner)

    @property
    def failed(self) -> bool:
        """True if the last save has failed on this rank; `wait` raises the reason."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last save is whole on disk; raises SaveFailed, once and on every rank, if it has failed.

        The process group raises another RuntimeError if a rank has died.
        """
        writing, self.writing = self.writing, None
        if writing is not None:
            while not wait([writing], timeout=BEAT_EVERY_S).done:  # the writer's group detects a dead peer
                beat(f"waiting for a checkpoint in {self.folder}")
            writing.result()

    def _write(
        self,
        pieces: list[StatePiece],
        frozen: list[StatePiece],
        content: dict[str, Any],
        group: dist.ProcessGroup,
        engine: "weakref.ref[Engine]",
    ) -> None:
        checked = pieces if self.frozen_files is not None else pieces + frozen
        not_finite = first_not_finite((piece.name, piece.values) for piece in checked)
        if (found := anywhere(not_finite, group)) is not None:
            raise NotFinite(self._not_finite(content["step"], found))
        name, rank = f"step_{content['step']:08d}", group.rank()
        partial = self.folder / f"{name}.partial"
        linked: dict[str, Any] = {}  # on the main rank: entries of the manifest

        def prepare() -> bool:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            linked.update(self.frozen_files.link(partial) if self.frozen_files is not None else {})
            return bool(linked)

        def finish(own: list[str]) -> None:
            files = {f.relative_to(partial).as_posix(): checksum(f) for pattern in own for f in partial.glob(pattern)}
            write_json(partial / f"rank_{rank}.json", {"files": files, "ages": content["ages"]})

        def publish() -> None:
            self.publish(partial, name, content, group.size(), linked)
            if content["trusted"]:
                self.prune()

        try:
            is_linked = together(group, prepare if rank == 0 else nothing)[0]
            own, part = [f"__{rank}_*"], FROZEN if content["frozen"] else ""
            if part and not is_linked:
                self.frozen_writer.write(_state(frozen), partial / FROZEN, group)
                own += [f"{FROZEN}/__{rank}_*"] + [f"{FROZEN}/{METADATA}"] * (rank == 0)
            self.state_writer.write(_state(pieces), partial, group, part)
            together(group, lambda: finish(own))
            together(group, publish if rank == 0 else nothing)
        except SaveFailed as error:  # but not the group's error: a dead peer ends the run as everywhere else
            shutil.rmtree(partial, ignore_errors=True)
            raise type(error)(
                f"The checkpoint of step {content['step']} could not be written to {self.folder} ({_one_line(error)}; "
                f"{_free_space(self.folder)}); remove that cause and start the same command again: it continues from "
                "the checkpoint before."
            ) from error
        self.frozen_files = FrozenFiles(engine, self.folder / name) if part else None

    def publish(
        self,
        partial: Path,
        name: str,
        content: dict[str, Any],
        world_size: int,
        linked: Mapping[str, Any] | None = None,
    ) -> None:
        """Merge `rank_<r>.json` of the ranks, which have the ages of their tensors; move `partial`, and `latest`.

        `linked`: entries of the manifest for files that another checkpoint has too.
        """
        manifest, ages = {METADATA: checksum(partial / METADATA), **(linked or {})}, {}
        for rank in range(world_size):
            file = partial / f"rank_{rank}.json"
            written = json.loads(file.read_text(encoding="utf-8"))
            manifest.update(written["files"])
            ages.update(written["ages"])
            file.unlink()
        write_json(partial / "state.json", content | {"ages": ages})
        manifest["state.json"] = checksum(partial / "state.json")
        write_json(partial / "manifest.json", manifest)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(partial, self.folder / name)
        self.write_latest(self.latest_step())

    def _not_finite(self, step: int, name: str) -> str:
        latest = self.latest_step()
        newest = "there is none before it" if latest is None else f"that of step {latest} stays the newest"
        return (
            f"The checkpoint of step {step} is not written to {self.folder}, because {name} is not finite ({newest}); "
            "set a lower schedule.peak, or optimizer.gradient_clipping, and start again."
        )

    def load_latest(
        self,
        engine: Engine,
        weights_only: bool = False,
        only: int | None = None,
        average: bool = False,
        read_only: bool = False,
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint, whatever layout wrote it; returns its step and `extra`, or None.

        `only`: the step to load instead of the newest. `average`: take the average of the trained weights in their
        place; ConfigurationError where the checkpoint has none.

        A checkpoint with a file that is cut short or altered is reported by a warning and renamed `step_*.damaged`, and
        the one before it is loaded. `weights_only` leaves the optimizer and the folder as they are, `read_only` the
        folder. Position embeddings
        of another resolution are resampled. Waits for a save that is being written. Raises ConfigurationError if the
        checkpoint is of another model, or if all are damaged: starting anew, over the remains, is for the user to
        decide. A collective of all ranks.
        """
        self.wait()
        for _ in range(LISTINGS):
            try:
                return self._load_newest(engine, weights_only, only, average, read_only or weights_only)
            except _Pruned as pruned:  # the run still trains, and has removed the checkpoint
                last = pruned
        raise ConfigurationError(f"{last.args[0]} was removed while it was read; start again when the run has ended.")

    def _load_newest(
        self, engine: Engine, weights_only: bool, only: int | None, average: bool, read_only: bool
    ) -> tuple[int, dict[str, Any]] | None:
        layout = engine.layout
        steps = [step for step in layout.broadcast_from_main(self.steps) if only in (None, step)]
        for step in reversed(steps):
            path, broken, mistake = self.path(step), None, None
            try:
                broken = broken_file(path, layout.rank, layout.world_size)
            except StorageFailed as error:
                mistake = str(error)
            self._raise_if_unreadable(mistake, path, layout)
            if not layout.any_rank(broken is not None):
                try:
                    return self._load(engine, path, weights_only, average)
                except CheckpointException as error:  # DCP raises the failure of one rank on all
                    self._raise_if_unreadable(f"{path} could not be read ({_one_line(error)}).", path, layout)
            self._raise_if_pruned(path, layout)
            if broken is not None:
                then = "; loading the one before it" * (step > steps[0])
                warnings.warn(f"checkpoint {path} is damaged ({broken}){then}", Notice, stacklevel=2)
            if layout.rank == 0 and not read_only:
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                os.replace(path, path.with_suffix(".damaged"))
                self.write_latest(self.latest_step())
        if steps:
            raise ConfigurationError(
                f"All checkpoints in {self.folder} are damaged (steps {', '.join(map(str, steps))}); bring one back "
                "from a copy, or choose another run.folder to start anew."
            )
        return None

    def _load_ages(self, engine: Engine, path: Path, ages: dict[str, int], missing: Collection[str]) -> None:
        """Continue to count the updates of each logical tensor; from 0 where its state is among the `missing` pieces.

        A count without its state is wrong: AdamW would take moments of zero for those of many updates.
        """
        optimizer = engine.optimizer
        lost = {name.removeprefix("optimizer/").rpartition("/")[0] for name in missing if name.startswith("optimizer/")}
        optimizer.ages.update({name: 0 if name in lost else ages.get(name, 0) for name in optimizer.ages})
        begins_anew = anywhere(min((name for name in lost if ages.get(name, 0)), default=None))
        if begins_anew is not None and engine.layout.rank == 0:
            warnings.warn(
                f"checkpoint {path} has no optimizer state for {begins_anew}, or has it in another shape; its state "
                "starts from zero, and its updates are counted from 0",
                Notice,
                stacklevel=2,
            )

    def _read(self, path: Path, layout: Layout) -> tuple[Reader, dict[str, Any]]:
        """Read the metadata and `state.json` of a checkpoint; raises on every rank if it fails on one."""
        reader = Reader(path)
        mistake: str | None = None
        try:
            reader.metadata  # noqa: B018 (read here, and kept)
            content: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except OSError as error:
            mistake = f"{path} could not be read ({error})."
        self._raise_if_unreadable(mistake, path, layout)
        return reader, content

    def _raise_if_unreadable(self, mistake: str | None, path: Path, layout: Layout) -> None:
        """Raise StorageFailed on every rank if the disk of one has failed."""
        if (found := anywhere(mistake)) is not None:
            self._raise_if_pruned(path, layout)
            failed = StorageFailed(found)
            failed.alone = False
            raise failed

    def _raise_if_pruned(self, path: Path, layout: Layout) -> None:
        if layout.broadcast_from_main(lambda: not path.exists() and bool(self.steps())):
            raise _Pruned(path)

    def _load(self, engine: Engine, path: Path, weights_only: bool, average: bool) -> tuple[int, dict[str, Any]]:
        reader, content = self._read(path, engine.layout)
        saved = reader.metadata
        shapes = {name: v.size for name, v in saved.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
        averages = average_names(shapes, path) if average else {}
        state = _state(_pieces(engine, optimizer=not weights_only, every=True))
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
        tensors = {averages.get(name, name): tensor for name, tensor in (wanted | resampled).items()}
        dcp.load(tensors, storage_reader=reader, planner=_Planner())
        for r, values in engine.held_weights():
            if (stored := resampled.get(f"weights/{r.name}")) is not None:
                values.copy_(parts[f"weights/{r.name}"].resampled(stored)[r.slices])
        engine.publish()
        if not weights_only:
            self._keep_frozen_files(engine, path, saved, content)
            missing = {name for name in state if name not in wanted}
            self._load_ages(engine, path, content["ages"], {name for name in missing if not name.endswith(AVERAGE)})
            found = (name for name in wanted if name.endswith(AVERAGE))
            engine.optimizer.averaged = {name.removeprefix("optimizer/").removesuffix(AVERAGE) for name in found}
        return content["step"], content["extra"]

    def _keep_frozen_files(self, engine: Engine, path: Path, saved: Metadata, content: dict[str, Any]) -> None:
        """Link later checkpoints to the frozen weights of one, if it holds those of the engine as they are."""
        parts = {part.name: part for _, part in parameter_parts(engine.blueprint.plan)}
        names, stored = _frozen_names(engine), saved.state_dict_metadata
        found = {name: stored.get(f"weights/{name}") for name in names}
        same = set(names) == set(content["frozen"]) and all(
            isinstance(each, TensorStorageMetadata)
            and (each.size, each.properties.dtype) == (parts[name].shape, engine.blueprint.dtype)
            for name, each in found.items()
        )
        self.frozen_files = FrozenFiles(weakref.ref(engine), path) if names and same else None


class _Planner(dcp.DefaultLoadPlanner):
    """DCP's planner, with progress reports to the watchdog."""

    def resolve_tensor(self, read_item: dcp.planner.ReadItem) -> Tensor:
        """Report progress, and return the tensor to read into."""
        beat(f"reading {read_item.dest_index.fqn}")
        return super().resolve_tensor(read_item)


def _pieces(engine: Engine, optimizer: bool, every: bool = False) -> list[StatePiece]:
    """Return all state to save, or to load (`every`); the values share the engine's memory, so loading fills them."""
    pieces = [StatePiece(f"weights/{r.name}", r, values) for r, values in engine.held_weights()]
    if optimizer:
        pieces += [piece._replace(name=f"optimizer/{piece.name}") for piece in engine.optimizer.saved_pieces(every)]
    return pieces


def _state(pieces: list[StatePiece]) -> dict[str, Tensor]:
    """Return the pieces by logical name, as DCP takes them."""
    divided = [(name, where, values) for name, where, values in pieces if isinstance(where, Rectangle)]
    whole = {name: values for name, where, values in pieces if not isinstance(where, Rectangle)}
    return {**logical_tensors(divided), **whole}


def _frozen_names(engine: Engine) -> list[str]:
    """Return the logical tensors that are not trained, on any rank."""
    return [part.name for p, part in parameter_parts(engine.blueprint.plan) if not p.requires_grad]


def _free_space(folder: Path) -> str:
    try:
        free = shutil.disk_usage(folder if folder.exists() else "/").free
    except OSError:
        return "its disk does not answer"
    return f"{free / 2**30:.2f} GiB are free there"


def _raise_anywhere(mistake: str | None) -> None:
    """Raise on every rank the ConfigurationError of the lowest rank that has one: stages hold different tensors."""
    if (found := anywhere(mistake)) is not None:
        raise ConfigurationError(found)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else " x ".join(map(str, size))
