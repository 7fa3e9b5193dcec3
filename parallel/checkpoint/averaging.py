"""Average the weights of several checkpoints into a new one, a piece of a tensor at a time.

DCP asks for each piece when it writes it, so the memory that is taken is that of one piece of every checkpoint, however
large the model is.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from common.errors import ConfigurationError
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.dcp_tensor import LogicalTensor
from parallel.checkpoint.folder import write_json
from parallel.checkpoint.manifest import checksum
from parallel.checkpoint.stored_weights import PREFIX, Reader, StoredWeights, stored_weights
from parallel.shards import Rectangle

Progress = Callable[[str], None]


class MeanTensor(LogicalTensor):
    """The mean of a weight over checkpoints; a piece of it is read when it is written."""

    logical_name: str
    stored: TensorStorageMetadata
    readers: Sequence[Reader]
    progress: Progress

    @staticmethod
    def __new__(
        cls, name: str, stored: TensorStorageMetadata, readers: Sequence[Reader], progress: Progress
    ) -> "MeanTensor":
        """Make the mean of the tensor `name`, which is `stored` so in the first checkpoint."""
        whole: Any = torch.Tensor
        self = whole._make_wrapper_subclass(cls, stored.size, dtype=stored.properties.dtype)
        self.logical_name, self.stored, self.readers, self.progress = name, stored, readers, progress
        return self

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.stored.chunks

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        self.progress(self.logical_name)
        size = next(chunk.sizes for chunk in self.stored.chunks if chunk.offsets == index.offset)
        total = torch.zeros(size, dtype=torch.float64)
        for reader in self.readers:
            piece = torch.empty(size, dtype=self.dtype)
            where = Rectangle(self.logical_name, self.stored.size, tuple(index.offset), size, 0, True)
            dcp.load({PREFIX + self.logical_name: LogicalTensor([(where, piece)])}, storage_reader=reader, no_dist=True)
            total += piece
        return (total / len(self.readers)).to(self.dtype)


def write_mean(
    checkpoints: Sequence[StoredWeights],
    run: Path,
    extra: Mapping[str, Any],
    progress: Progress = lambda name: None,
) -> Path:
    """Write the mean of the weights as a checkpoint of `run`; return its folder, which appears whole or not at all.

    Its step is the largest of theirs; it has no optimizer state. Raises ConfigurationError for checkpoints of different
    models.
    """
    readers, first = [each.reader for each in checkpoints], stored_weights(checkpoints[0].reader)
    for other in checkpoints[1:]:
        _check_same({name: each.size for name, each in first.items()}, checkpoints[0], other)
    step = max(each.step for each in checkpoints)
    checkpointer = Checkpointer.from_run(run)
    partial = checkpointer.path(step).with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state: dict[str, Any] = {PREFIX + name: MeanTensor(name, each, readers, progress) for name, each in first.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        writer = dcp.FileSystemWriter(partial, sync_files=True, per_thread_copy_ahead=0)
        dcp.save(state, storage_writer=writer, no_dist=True)
    write_json(partial / "rank_0.json", {"files": {f.name: checksum(f) for f in partial.glob("__0_*")}, "ages": {}})
    content = {"step": step, "extra": dict(extra), "frozen": [], "ages": {}, "trusted": True}
    checkpointer.publish(partial, checkpointer.path(step).name, content, 1)
    return checkpointer.path(step)


def _check_same(shapes: Mapping[str, torch.Size], first: StoredWeights, other: StoredWeights) -> None:
    found = {name: each.size for name, each in stored_weights(other.reader).items()}
    different = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    if different:
        name = different[0]
        here, there = (None if x is None else tuple(x) for x in (shapes.get(name), found.get(name)))
        raise ConfigurationError(
            f"{other.path} is of another model than {first.path}: {name} is {there or 'missing'}, not "
            f"{here or 'missing'}; average checkpoints of one model."
        )
