"""The tensor-parallel group that layers are built for, before and after it has started."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.megatron import (
    ModelParallelConfig,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)


class PlannedGroup:
    """A tensor-parallel group that is not started: its number of ranks, and this rank's number in it.

    By default the group of one process alone. A layer that holds its matrix whole computes by itself, because
    megatron-core 0.16.1 needs a started group. Layers of a larger group compute after `join_group`.
    """

    def __init__(self, num_ranks: int = 1, rank: int = 0) -> None:
        self._num_ranks, self._rank = num_ranks, rank

    def size(self) -> int:
        """Return the number of ranks."""
        return self._num_ranks

    def rank(self) -> int:
        """Return this rank's number."""
        return self._rank


@dataclass
class TensorParallel:
    """The tensor-parallel group that layers are built for.

    `sequence`: Megatron's sequence parallelism splits activations between the layers along the sequence.
    """

    group: Any = field(default_factory=PlannedGroup)
    sequence: bool = False

    @property
    def size(self) -> int:
        """Number of tensor-parallel ranks."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    def megatron_options(self) -> dict[str, Any]:
        """Return the options that every Megatron layer here takes; initial values come from `Part.initialize`."""
        config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=self.sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.get_default_dtype(),
            gradient_accumulation_fusion=False,
        )
        return {"config": config, "init_method": nn.init.zeros_, "tp_group": self.group}

    def padding(self, length: int) -> int:
        """Return the positions that a sequence lacks to be split evenly over the ranks."""
        return -length % self.size if self.sequence else 0

    def scatter(self, x: Tensor) -> Tensor:
        """Take this rank's [S / tensor, ...] of [S, ...] under sequence parallelism; else return x."""
        return scatter_to_sequence_parallel_region(x, group=self.group) if self.sequence else x

    def gather(self, x: Tensor, partial_gradient: bool) -> Tensor:
        """Undo `scatter`: [S / tensor, ...] -> [S, ...].

        `partial_gradient`: each rank computes a different part of the result from here on, so the backward pass sums
        gradients over the ranks.
        """
        if self.size == 1:
            return x
        if not self.sequence:
            return copy_to_tensor_model_parallel_region(x, group=self.group) if partial_gradient else x
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=partial_gradient, group=self.group)

    def ungather(self, x: Tensor) -> Tensor:
        """Undo `gather(x, partial_gradient=True)`: return x as before, whose whole gradient counts once over the ranks.

        No collective: each rank takes its part of x and of the gradient, or rank 0 the gradient where x is not split.
        """
        if self.sequence:
            return x.chunk(self.size)[self.rank]
        x = x.view_as(x)
        if x.requires_grad and self.rank:
            x.register_hook(torch.zeros_like)
        return x


def join_group(module: nn.Module, group: Any) -> None:
    """Replace the planned group of a module's layers by the group that has started, of the same size and rank."""
    for layer in module.modules():
        if hasattr(layer, "tp_group"):  # Megatron's layers
            layer.tp_group = group
        if isinstance(parallel := getattr(layer, "parallel", None), TensorParallel):
            parallel.group = group


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Turn sequence parallelism off within the context: a decoding step has one token, which cannot be split."""
    layers = [m for m in model.modules() if getattr(m, "sequence_parallel", False)]
    found = (getattr(m, "parallel", None) for m in model.modules())
    parallels = [each for each in found if isinstance(each, TensorParallel) and each.sequence]

    def switch(on: bool) -> None:
        for parallel in parallels:
            parallel.sequence = on
        for layer in layers:
            layer.sequence_parallel = on  # type: ignore[assignment]

    switch(False)
    try:
        yield
    finally:
        switch(True)
