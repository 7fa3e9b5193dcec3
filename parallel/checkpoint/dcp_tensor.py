"""Logical tensors for PyTorch's distributed checkpoint (DCP): the rectangles of a named whole that this rank has."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from common.errors import ConfigurationError
from parallel.optimizer.base import AVERAGE
from parallel.shards import Rectangle


class LogicalTensor(Tensor):
    """A tensor with the shape of the whole, but the memory of this rank's rectangles only.

    DCP reads and writes those in place, through its `_Checkpointable` protocol (torch >= 2.3). No other operation
    works.
    """

    pieces: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, pieces: list[tuple[Rectangle, Tensor]]) -> "LogicalTensor":
        """Wrap this rank's (rectangle, values) of one logical tensor."""
        rectangle, values = pieces[0]
        whole: Any = torch.Tensor
        self = whole._make_wrapper_subclass(cls, rectangle.shape, dtype=values.dtype, device=values.device)
        self.pieces = {torch.Size(r.offset): values for r, values in pieces}
        return self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{function} of a logical tensor: it exists only to be saved and loaded")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, values.shape) for offset, values in self.pieces.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.pieces[index.offset]


def logical_tensors(pieces: list[tuple[str, Rectangle, Tensor]]) -> dict[str, Tensor]:
    """Group (name, rectangle, values) into logical tensors by name."""
    grouped: dict[str, list[tuple[Rectangle, Tensor]]] = {}
    for name, rectangle, values in pieces:
        grouped.setdefault(name, []).append((rectangle, values))
    return {name: LogicalTensor(found) for name, found in grouped.items()}


def average_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Return the name of the average of each trained weight in a checkpoint, by the weight's name.

    Raises ConfigurationError where there is none.
    """
    found = [name for name in names if name.startswith("optimizer/") and name.endswith(AVERAGE)]
    if not found:
        raise ConfigurationError(
            f"{path} holds no average of its weights; train with optimizer.average_decay, or leave the average out."
        )
    return {f"weights/{name.removeprefix('optimizer/').removesuffix(AVERAGE)}": name for name in found}
