"""Read the weights of a checkpoint without a model: by name, on one process, whatever layout wrote them."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.errors import ConfigurationError
from parallel.checkpoint.checkpointer import broken_file
from parallel.checkpoint.dcp_tensor import average_names
from parallel.checkpoint.folder import CheckpointFolder

PREFIX = "weights/"  # of a checkpoint's tensors that are weights


def stored_weights(path: Path) -> dict[str, TensorStorageMetadata]:
    """Return what a checkpoint's metadata holds of each weight, by logical name. Raises OSError."""
    metadata: Metadata = dcp.FileSystemReader(path).read_metadata()
    return {name.removeprefix(PREFIX): each for name, each in metadata.state_dict_metadata.items()
            if name.startswith(PREFIX) and isinstance(each, TensorStorageMetadata)}  # fmt: skip


class StoredWeights:
    """The weights in one checkpoint of a run.

    `run`: the run's folder. `step`: the steps done. `shapes` and `dtypes`: by logical name. Optimizer state is skipped.
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
        found = stored_weights(self.path)
        self.averages = _averages(self.path) if average else {}
        self.shapes = {name: each.size for name, each in found.items()}
        self.dtypes = {name: each.properties.dtype for name, each in found.items()}

    @property
    def extra(self) -> dict[str, Any]:
        """The facts that the run saved with the checkpoint, such as the tokenizer's checksum; {} if there are none."""
        content = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        extra = content.get("extra")
        return extra if isinstance(extra, dict) else {}

    def load(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Read whole tensors by logical name, in the type that they are stored in."""
        stored = {name: self.averages.get(PREFIX + name, PREFIX + name) for name in names}
        tensors = {stored[name]: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
        return {name: tensors[stored[name]] for name in names}


def _averages(path: Path) -> dict[str, str]:
    metadata: Metadata = dcp.FileSystemReader(path).read_metadata()
    return average_names(metadata.state_dict_metadata, path)
