"""Count what a plan needs of a unit besides its cost: sizes of its parameters, on all ranks and on one."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from model.costs import Unit
from model.layers import parameter_info, parameter_parts
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.optimizer.base import optimizer_class


@dataclass(frozen=True)
class UnitInfo:
    """Hold what a plan needs of a unit besides its cost: whole sizes of its parameters."""

    name: str
    elements: int
    trained_elements: int
    trained: bool
    below_trained: bool
    parameters: int
    largest: int = 0
    """Elements of the largest trained parameter."""
    copied: int = 0
    """Elements that every tensor-parallel rank holds whole."""
    copied_trained: int = 0
    state_bytes: int = 0
    """State of the optimizer that every rank holds whole."""
    summed: tuple[int, ...] = ()
    """Numbers of fp32 that each all-reduce of an update takes."""

    def local(self, parallel: ParallelConfig) -> float:
        """Return the elements on a tensor-parallel rank."""
        tensor = 1 if parallel.replicate_frozen_vit and self.stack == "vit" else parallel.tensor
        return (self.elements - self.copied) / tensor + self.copied

    def local_trained(self, parallel: ParallelConfig) -> float:
        """Return the trained elements on a tensor-parallel rank."""
        return (self.trained_elements - self.copied_trained) / parallel.tensor + self.copied_trained

    @property
    def stack(self) -> str:
        """Return the stack of `STACKS` that the unit belongs to."""
        first = self.name.partition("_")[0]
        return {"patches": "vit"}.get(first, first)


def unit_infos(units: Iterable[tuple[str, Unit]], optimizer: OptimizerConfig) -> list[UnitInfo]:
    """Count the parameters of units, in their order, and the state of their optimizer."""
    found, below, kind = [], False, optimizer_class(optimizer)
    for name, unit in units:
        parts = [(p, part.shape) for p, part in parameter_parts(unit)]
        trained = [(p, shape) for p, shape in parts if p.requires_grad]
        summed = [kind.summed(shape, optimizer) for _, shape in trained]
        found.append(
            UnitInfo(
                name, _elements(parts), _elements(trained), bool(trained), below, len(parts),
                largest=max((p.numel() for p, _ in trained), default=0),
                copied=_elements(parts, copied=True),
                copied_trained=_elements(trained, copied=True),
                state_bytes=sum(kind.state_bytes(shape, optimizer) for _, shape in trained),
                summed=tuple(map(sum, zip(*summed, strict=True))),
            )
        )  # fmt: skip
        below |= bool(trained)
    return found


def _elements(parts: Iterable[tuple[nn.Parameter, torch.Size]], copied: bool = False) -> int:
    """Count elements; `copied`: of parameters alone that every tensor-parallel rank holds whole."""
    return sum(shape.numel() for p, shape in parts if not (copied and parameter_info(p).divisible))
