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
    `whole_vit`: every rank holds the ViT whole, and runs it on its share of the images.
    """

    group: Any = field(default_factory=PlannedGroup)
    sequence: bool = False
    whole_vit: bool = False

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

    def for_vit(self) -> "TensorParallel":
        """Return the group that divides the ViT's tensors: one rank alone where each holds them whole."""
        return TensorParallel() if self.whole_vit else self

    def share_images(self, images: Tensor) -> Tensor:
        """Take this rank's [ceil(I / tensor), ...] of [I, ...] where the ViT is whole; else return `images`.

        Zeros follow the last image, so that all shares are equal.
        """
        if not self.whole_vit:
            return images
        share = num_shared(len(images), self.size)
        own = images[self.rank * share : (self.rank + 1) * share]
        missing = share - len(own)
        return torch.cat([own, own.new_zeros(missing, *images.shape[1:])]) if missing else own

    def gather_images(self, x: Tensor) -> Tensor:
        """Return [I, N, d] of all images on every rank, of a sequence [N, I, d] or of this rank's share of it.

        Under `whole_vit` zero images follow. A rank has [N / tensor, I, d] under sequence parallelism, else [N, I /
        tensor, d]. No collective in the backward pass, as all ranks have the same gradient: each takes its share.
        """
        if not self.whole_vit:
            return self.gather(x, partial_gradient=False).transpose(0, 1)
        x = x.transpose(0, 1).contiguous()
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.group)

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


def num_shared(images: int, ranks: int) -> int:
    """Return the images of each rank's share, the same on all ranks; the last shares may hold zeros."""
    return -(-images // ranks)


def join_group(module: nn.Module, group: Any) -> None:
    """Replace the planned group of a module's layers by the group that has started, of the same size and rank."""
    for layer in module.modules():
        planned: Any = getattr(layer, "tp_group", None)  # of Megatron's layers; of one rank in a whole ViT
        if planned is not None and planned.size() == group.size():
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
