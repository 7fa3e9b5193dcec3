"""Translate whole state dicts between logical names and the names of a foreign checkpoint.

A file of this folder per format makes the `Table`: `mt5`, `siglip`, `big_vision`. A new backbone is a new file.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from common.errors import ConfigurationError


@dataclass(frozen=True)
class ForeignTensor:
    """A logical tensor's name in a foreign checkpoint, and its layout there.

    `read` maps the foreign layout to ours, `write` ours to the foreign one.
    """

    name: str
    read: Callable[[Tensor], Tensor] = lambda x: x
    write: Callable[[Tensor], Tensor] = lambda x: x


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


def import_tensors(foreign: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return the logical tensors of a foreign state dict.

    Raises ConfigurationError if a tensor of the table is missing, or a tensor is neither in the table nor ignored.
    """
    found = {table.without_prefixes(name): tensor for name, tensor in foreign.items()}
    for name, same in table.tied.items():
        if same in found:
            found.setdefault(name, found[same])
    wanted = {tensor.name for tensor in table.tensors.values()}
    missing = wanted - found.keys()
    unknown = [name for name in found.keys() - wanted if not any(fnmatchcase(name, p) for p in table.ignored)]
    if missing or unknown:
        complaints = [
            f"{verb} {_shortened(names)}" for verb, names in (("lacks", missing), ("also holds", unknown)) if names
        ]
        raise ConfigurationError(
            f"The checkpoint {' and '.join(complaints)}; choose the vit= or mt5= size it was made with."
        )
    return {ours: tensor.read(found[tensor.name]).contiguous() for ours, tensor in table.tensors.items()}


def export_tensors(logical: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return the foreign state dict of the table's tensors; raises ConfigurationError if one is missing."""
    missing = table.tensors.keys() - logical.keys()
    if missing:
        raise ConfigurationError(
            f"The model lacks {_shortened(missing)}; export it with the sizes it was trained with."
        )
    return {tensor.name: tensor.write(logical[ours]).contiguous() for ours, tensor in table.tensors.items()}


def weight_and_bias(ours: str, theirs: str) -> dict[str, str]:
    """Return the two names of a layer that has the same kinds of tensors in both checkpoints."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def _shortened(names: Iterable[str]) -> str:
    """List the first three names and the number of the others."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
