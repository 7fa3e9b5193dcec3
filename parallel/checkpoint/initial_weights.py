"""Fill an engine with first weights, from files or from the checkpoint of another run."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from common.errors import ConfigurationError, Notice
from common.progress import beat
from model.layers import Part, parameter_parts
from model.weights.stored import Stored
from parallel.checkpoint.dcp_tensor import logical_tensors
from parallel.checkpoint.manifest import broken_file
from parallel.checkpoint.stored_weights import PREFIX, Reader, stored_weights
from parallel.engine.base import Engine
from parallel.layout import Layout
from parallel.shards import Rectangle

Pieces = Sequence[tuple[Rectangle, Tensor]]
ROUNDING = 2.0**-8  # of the largest value: more than bf16 rounds off, also where positions are resampled after it


class FirstWeights(Protocol):
    """Tensors by logical name that give a model its first values."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each, by logical name."""

    def fill(self, pieces: Pieces, parts: Mapping[str, Part]) -> None:
        """Copy into the rectangles of this rank, whose names are among `shapes`; read nothing else."""

    def check(self, layout: Layout) -> None:
        """Raise ConfigurationError on every rank for damaged files. A collective."""


class FileWeights:
    """Tensors in files."""

    def __init__(self, tensors: Stored) -> None:
        self.tensors = tensors
        self.shapes = {name: stored.shape for name, stored in tensors.items()}

    def fill(self, pieces: Pieces, parts: Mapping[str, Part]) -> None:
        """See FirstWeights. A tensor is mapped, so that no page is read but those of the rectangles."""
        for name, own in groupby(sorted(pieces, key=lambda piece: piece[0].name), lambda piece: piece[0].name):
            beat(f"reading {name}")
            stored = self.tensors[name]
            whole = parts[name].resampled(stored.read())
            for rectangle, values in own:
                values.copy_(whole[rectangle.slices])
                if stored.scale != 1.0:
                    values.mul_(stored.scale)

    def check(self, layout: Layout) -> None:
        """See FirstWeights: nothing to do, as opening the files has compared their sizes with their headers."""


class CheckpointWeights:
    """Tensors in a checkpoint of another run, whatever layout wrote it. Its folder is `path`."""

    def __init__(self, path: Path) -> None:
        """Read the names and shapes. Raises ConfigurationError for a checkpoint that cannot be read."""
        self.path, self.reader = path, Reader(path)
        try:
            stored = stored_weights(self.reader)
        except OSError as error:
            raise ConfigurationError(
                f"{path} is no whole checkpoint ({error.strerror}); bring it back from a copy, or name another step."
            ) from error
        self.shapes = {name: each.size for name, each in stored.items()}

    def fill(self, pieces: Pieces, parts: Mapping[str, Part]) -> None:
        """See FirstWeights."""
        direct = [(PREFIX + r.name, r, values) for r, values in pieces if self.shapes[r.name] == r.shape]
        # A position embedding of another resolution is small: every rank reads it whole.
        other = {PREFIX + r.name: torch.empty(self.shapes[r.name]) for r, _ in pieces if self.shapes[r.name] != r.shape}
        beat(f"reading {self.path}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # each rank reads by itself
            dcp.load(logical_tensors(direct) | other, storage_reader=self.reader, no_dist=True)
        for r, values in pieces:
            if (stored := other.get(PREFIX + r.name)) is not None:
                values.copy_(parts[r.name].resampled(stored)[r.slices])

    def check(self, layout: Layout) -> None:
        """See FirstWeights: compare every file with the checksum that was saved, each rank some of them."""
        broken = broken_file(self.path, layout.rank, layout.world_size)
        if (found := next(filter(None, layout.gather_objects([broken])), None)) is not None:
            raise ConfigurationError(
                f"{self.path} is damaged ({found}); bring it back from a copy, or name another step."
            )


@torch.no_grad()
def load_first_weights(engine: Engine, sources: Sequence[FirstWeights]) -> None:
    """Fill the parameters that the sources name; others keep their values. Each rank reads only its rectangles.

    A collective of all ranks. Raises ConfigurationError as `FirstWeights.check` does.
    """
    parts, held = {part.name: part for _, part in parameter_parts(engine.blueprint.plan)}, engine.held_weights()
    for source in sources:
        source.check(engine.layout)
        source.fill([(r, values) for r, values in held if r.name in source.shapes], parts)
    engine.publish()


@torch.no_grad()
def thaw(engine: Engine, sources: Sequence[FirstWeights], frozen: Collection[str], where: str) -> None:
    """Give weights that were `frozen` in the checkpoint `where`, and are trained now, their fp32 values again.

    A checkpoint holds frozen weights in the compute precision; in bf16 training would begin with rounded values. They
    are read anew from the first weights, rectangle by rectangle, and taken where rounding explains the difference: a
    file may be another one by now. A Notice names a tensor that keeps its rounded values. A collective of all ranks.
    """
    plan = [(p, part) for p, part in parameter_parts(engine.blueprint.plan) if part.name in frozen]
    thawed = {part.name: part for p, part in plan if p.requires_grad}
    if not thawed or engine.blueprint.dtype == torch.float32:
        return
    held = [(r, r.view(shard.weights.detach())) for shard in engine.shards() for r in shard.rectangles]
    rounded = {r.name for r, values in held if r.name in thawed and not _restore(r, values, sources, thawed[r.name])}
    engine.publish()
    everywhere = sorted(set(engine.layout.gather_objects(sorted(rounded)[:1])))
    if everywhere and engine.layout.rank == 0:
        warnings.warn(
            f"{everywhere[0]} was frozen in {where}, and goes on from its values in bf16; set weights.* to the files "
            "that the run began with, so that it goes on from those in fp32",
            Notice,
            stacklevel=2,
        )


def _restore(r: Rectangle, values: Tensor, sources: Sequence[FirstWeights], part: Part) -> bool:
    """Copy a rectangle from the first source that has it, if it differs from `values` by rounding alone."""
    found = torch.empty_like(values)
    for source in sources:
        if r.name in source.shapes:
            source.fill([(r, found)], {r.name: part})
            if bool((found - values).abs().max() <= ROUNDING * found.abs().max()):
                values.copy_(found)
                return True
    return False
