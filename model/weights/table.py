"""Translate whole state dicts between logical names and the names of a foreign checkpoint.

A file of this folder per format makes the `Table`: `mt5`, `siglip`, `big_vision`. A new backbone is a new file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from common.errors import ConfigurationError
from model.weights.stored import Stored, StoredTensor, listed


@dataclass(frozen=True)
class ForeignTensor:
    """A logical tensor's name in a foreign checkpoint, and its layout there.

    `read` maps the foreign layout to ours, `write` ours to the foreign one. Values of files are multiplied by `scale`.
    """

    name: str
    read: Callable[[Tensor], Tensor] = lambda x: x
    write: Callable[[Tensor], Tensor] = lambda x: x
    scale: float = 1.0


@dataclass(frozen=True)
class Table:
    """The tensors of a foreign checkpoint by logical name, and the differences between checkpoints of one format."""

    tensors: Mapping[str, ForeignTensor]
    """Logical name -> foreign tensor."""
    ignored: tuple[str, ...] = ()
    """Shell patterns of foreign names that have no logical tensor: pooling heads, the other tower, copies."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that foreign names may have, removed in this order."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Foreign name -> foreign name that replaces it where a checkpoint saves two tied tensors once."""

    def without_prefixes(self, name: str) -> str:
        """Return a foreign name without the prefixes that it may have."""
        for prefix in self.prefixes:
            name = name.removeprefix(prefix)
        return name


@dataclass(frozen=True)
class Match:
    """The names of a foreign checkpoint: by logical name, and those that a table leaves out."""

    names: Mapping[str, str]
    left_out: list[str]


def match(
    names: Collection[str],
    table: Table,
    where: str = "The checkpoint",
    advice: str = "choose the vit= or mt5= size it was made with",
) -> Match:
    """Find the tensors of a table among foreign names.

    Raises ConfigurationError if a tensor of the table is missing, or a name is neither in the table nor ignored.
    """
    found = {table.without_prefixes(name): name for name in names}
    for name, same in table.tied.items():
        if same in found:
            found.setdefault(name, found[same])
    wanted = {tensor.name for tensor in table.tensors.values()}
    missing, others = wanted - found.keys(), found.keys() - wanted
    unknown = [name for name in others if not any(fnmatchcase(name, p) for p in table.ignored)]
    if missing or unknown:
        complaints = [f"{verb} {listed(each)}" for verb, each in (("lacks", missing), ("also holds", unknown)) if each]
        raise ConfigurationError(f"{where} {' and '.join(complaints)}; {advice}.")
    left_out = [found[name] for name in sorted(others)]
    return Match({ours: found[tensor.name] for ours, tensor in table.tensors.items()}, left_out)


def import_tensors(foreign: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return the logical tensors of a foreign state dict. Raises ConfigurationError as `match` does."""
    names = match(foreign.keys(), table).names
    return {ours: tensor.read(foreign[names[ours]]).contiguous() for ours, tensor in table.tensors.items()}


def import_stored(foreign: Stored, table: Table, names: Mapping[str, str]) -> Stored:
    """Return the logical tensors of foreign files; none is read. `names`: those of `match`."""
    return {ours: _as_ours(foreign[names[ours]], tensor) for ours, tensor in table.tensors.items()}


def _as_ours(stored: StoredTensor, foreign: ForeignTensor) -> StoredTensor:
    try:
        shape = foreign.read(torch.empty(stored.shape, device="meta")).shape
    except (RuntimeError, IndexError):  # of another shape than the format has -> reported as it lies in the file
        return stored
    return StoredTensor(shape, stored.dtype, lambda: foreign.read(stored.read()), stored.scale * foreign.scale)


def export_tensors(logical: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return the foreign state dict of the table's tensors; raises ConfigurationError if one is missing."""
    missing = table.tensors.keys() - logical.keys()
    if missing:
        raise ConfigurationError(f"The model lacks {listed(missing)}; export it with the sizes it was trained with.")
    return {tensor.name: tensor.write(logical[ours]).contiguous() for ours, tensor in table.tensors.items()}


def weight_and_bias(ours: str, theirs: str) -> dict[str, str]:
    """Return the two names of a layer that has the same kinds of tensors in both checkpoints."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
