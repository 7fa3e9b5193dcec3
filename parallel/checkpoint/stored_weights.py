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
from parallel.checkpoint.checkpointer import checksum
from parallel.checkpoint.folder import CheckpointFolder, raise_if_storage_failed

PREFIX = "weights/"


class StoredWeights:
    """The weights in one checkpoint of a run.

    `run`: the run's folder. `step`: the steps done. `shapes` and `dtypes`: by logical name. Optimizer state is skipped.
    """

    def __init__(self, run: Path, step: int) -> None:
        """Read the metadata of the checkpoint of a step. Raises ConfigurationError for one that is damaged."""
        self.run, self.step = run, step
        self.path = CheckpointFolder.from_run(run).path(step)
        self._check()
        metadata: Metadata = dcp.FileSystemReader(self.path).read_metadata()
        found = {name.removeprefix(PREFIX): each for name, each in metadata.state_dict_metadata.items()
                 if name.startswith(PREFIX) and isinstance(each, TensorStorageMetadata)}  # fmt: skip
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
        tensors = {PREFIX + name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(self.path), no_dist=True)
        return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}

    def _check(self) -> None:
        """Compare every file with the manifest. Raises ConfigurationError for a file that is missing or altered."""
        wrong = "manifest.json"
        try:
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            for wrong in sorted({".metadata", "state.json"} | manifest.keys()):
                if checksum(self.path / wrong) != manifest.get(wrong):
                    break
            else:
                return
        except (OSError, ValueError, AttributeError) as error:
            raise_if_storage_failed(error, self.path)
        raise ConfigurationError(
            f"{self.path} is damaged ({wrong} is missing, cut short or altered); bring it back from a copy, or choose "
            "another step."
        )
