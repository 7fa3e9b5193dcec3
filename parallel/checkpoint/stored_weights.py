"""Read the weights of a checkpoint without a model: by name, on one process, whatever layout wrote them."""

import json
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.errors import ConfigurationError
from model.weights.stored import Stored, StoredTensor
from parallel.checkpoint.dcp_tensor import average_names
from parallel.checkpoint.folder import CheckpointFolder
from parallel.checkpoint.manifest import broken_file

PREFIX = "weights/"  # of a checkpoint's tensors that are weights


class Reader(dcp.FileSystemReader):
    """Read a checkpoint whose metadata, which is as long as the list of its tensors, is read once."""

    @cached_property
    def metadata(self) -> Metadata:
        """The names, shapes and places of all tensors. Raises OSError."""
        return super().read_metadata()

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """See FileSystemReader."""
        return self.metadata


def stored_weights(reader: Reader) -> dict[str, TensorStorageMetadata]:
    """Return what a checkpoint's metadata holds of each weight, by logical name. Raises OSError."""
    return {name.removeprefix(PREFIX): each for name, each in reader.metadata.state_dict_metadata.items()
            if name.startswith(PREFIX) and isinstance(each, TensorStorageMetadata)}  # fmt: skip


class StoredWeights:
    """The weights in one checkpoint of a run.

    `run`: the run's folder. `step`: the steps done. `tensors`: by logical name, in the types that they are stored in.
    Optimizer state is skipped.
    """

    def __init__(self, run: Path, step: int, average: bool = False) -> None:
        """Read the metadata of the checkpoint of a step; with `average`, trained weights are their average.

        Raises ConfigurationError for one that is damaged, or has no average.
        """
        self.run, self.step = run, step
        self.path = CheckpointFolder.from_run(run).path(step)
        if (broken := broken_file(self.path)) is not None:
            raise ConfigurationError(
                f"{self.path} is damaged ({broken} is missing, cut short or altered); bring it back from a copy, or "
                "choose another step."
            )
        self.reader = Reader(self.path)
        averages = average_names(self.reader.metadata.state_dict_metadata, self.path) if average else {}
        self.tensors: Stored = {
            name: StoredTensor(
                each.size, each.properties.dtype, self._read(averages.get(PREFIX + name, PREFIX + name), each)
            )
            for name, each in stored_weights(self.reader).items()
        }

    @property
    def extra(self) -> dict[str, Any]:
        """The facts that the run saved with the checkpoint, such as the tokenizer's checksum; {} if there are none."""
        content = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        extra = content.get("extra")
        return extra if isinstance(extra, dict) else {}

    def _read(self, key: str, stored: TensorStorageMetadata) -> Callable[[], Tensor]:
        """Return what reads the tensor `key` of the checkpoint whole, in the type of the weight `stored`."""

        def read() -> Tensor:
            found = {key: torch.empty(stored.size, dtype=stored.properties.dtype)}
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
                    dcp.load(found, storage_reader=self.reader, no_dist=True)
            except (OSError, CheckpointException) as error:  # a run in progress prunes its old checkpoints
                raise ConfigurationError(
                    f"{self.path} was removed or altered while {key} was read; name a step that is kept."
                ) from error
            return found[key]

        return read
