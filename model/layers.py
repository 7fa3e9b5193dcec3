"""Layers over Megatron-Core's, whose parameters are described by logical tensors.

Each layer describes the *logical* tensors that its parameters hold. A parameter is a stack of row blocks (`Part`),
each the local block of one logical matrix: `ColumnLinear({"query": n, "key": n, "value": n})` is one matrix product,
yet optimizer, checkpoint and initial values work on three matrices, whatever the tensor-parallel size:

    parameter of tensor-parallel rank 1 of 2       logical tensors, [n, d_in] each
        rows 0 .. n/2    query, rows n/2 .. n          query.weight
        rows n/2 .. n    key,   rows n/2 .. n          key.weight
        rows n .. 3n/2   value, rows n/2 .. n          value.weight
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.initializers import Initializer, zeros
from model.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from model.tensor_parallel import TensorParallel


@dataclass(frozen=True)
class Part:
    """One rank's block of a logical tensor, as it lies in a parameter.

    `name` is relative to the module. Elements [start, start + block.numel()) of the flattened parameter are the
    block, at `offset` of the logical tensor of `shape`. `resample`, of position embeddings [N, ...] only, maps those
    of another square grid to N positions.
    """

    name: str
    shape: torch.Size
    initialize: Initializer
    offset: tuple[int, ...]
    block: torch.Size
    start: int = 0
    resample: Callable[[Tensor, int], Tensor] | None = None

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block as an index into the logical tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.block, strict=True))

    def fits(self, shape: torch.Size | None) -> bool:
        """Return whether a stored tensor of this shape can be loaded, after resampling if need be."""
        if shape is None or shape == self.shape or self.resample is None:
            return shape == self.shape
        is_square = len(shape) > 0 and shape[0] > 0 and math.isqrt(shape[0]) ** 2 == shape[0]
        return is_square and shape[1:] == self.shape[1:]

    def resampled(self, stored: Tensor) -> Tensor:
        """Return a stored tensor that fits in the shape of the logical tensor."""
        if stored.shape == self.shape:
            return stored
        assert self.resample is not None
        return self.resample(stored, self.shape[0])


@dataclass(frozen=True)
class ParameterInfo:
    """The logical tensors that a parameter holds, and its relation to the tensor-parallel group.

    `split`: tensor-parallel ranks hold different elements; `divisible`: several ranks would. `partial_gradient`: under
    sequence parallelism each rank computes from a part of the sequence, so gradients must be summed over the group.
    """

    parts: tuple[Part, ...]
    split: bool
    partial_gradient: bool = False
    divisible: bool = False


def describe_parameter(parameter: Tensor, info: ParameterInfo) -> None:
    """Attach `info` to a parameter; `parameter_info` returns it."""
    parameter.info = info  # type: ignore[attr-defined]


def parameter_info(parameter: Tensor) -> ParameterInfo:
    """Return the info of a parameter; raises AttributeError for a parameter that no layer has described."""
    info: ParameterInfo = parameter.info  # type: ignore[attr-defined]
    return info


def describe_replicated(
    parameter: Tensor,
    name: str,
    initialize: Initializer,
    partial_gradient: bool = False,
    resample: Callable[[Tensor, int], Tensor] | None = None,
) -> None:
    """Describe a parameter that every tensor-parallel rank holds whole."""
    shape = parameter.shape
    part = Part(name, shape, initialize, (0,) * len(shape), shape, resample=resample)
    describe_parameter(parameter, ParameterInfo((part,), split=False, partial_gradient=partial_gradient))


def split_parameter(
    name: str, shape: tuple[int, ...], dim: int, parallel: TensorParallel, initialize: Initializer
) -> nn.Parameter:
    """Make this rank's slice, along `dim`, of a logical tensor that the tensor-parallel ranks divide evenly."""
    block = list(shape)
    block[dim] //= parallel.size
    parameter = nn.Parameter(torch.empty(block))
    describe_split(parameter, name, shape, dim, parallel, initialize)
    return parameter


def describe_split(
    parameter: Tensor, name: str, shape: tuple[int, ...], dim: int, parallel: TensorParallel, initialize: Initializer
) -> None:
    """Describe a parameter that is this rank's slice, along `dim`, of one logical tensor."""
    offset = [0] * len(shape)
    offset[dim] = parallel.rank * parameter.shape[dim]
    part = Part(name, torch.Size(shape), initialize, tuple(offset), parameter.shape)
    describe_parameter(parameter, ParameterInfo((part,), split=parallel.size > 1, divisible=True))


def parameter_parts(module: nn.Module, name: str = "") -> Iterator[tuple[nn.Parameter, Part]]:
    """Yield every (parameter, part) of a module of that name, parts with their full logical names.

    Raises RuntimeError for a parameter that no layer has described.
    """
    for prefix, child in module.named_modules(prefix=name):
        for own, parameter in child.named_parameters(recurse=False):
            if not hasattr(parameter, "info"):
                raise RuntimeError(f"parameter {prefix}.{own} has no logical parts: describe it where it is made")
            for part in parameter_info(parameter).parts:
                yield parameter, replace(part, name=f"{prefix}.{part.name}" if prefix else part.name)


class ColumnLinear(ColumnParallelLinear):
    """Several linear maps of one input in one matrix product, their outputs split over the tensor-parallel ranks.

    `gathered`: the input is the result of `TensorParallel.gather` with a partial gradient, which several layers share.
    """

    def __init__(
        self,
        d_in: int,
        outputs: Mapping[str, int],
        parallel: TensorParallel,
        *,
        bias: bool,
        weight_init: Initializer | Mapping[str, Initializer],
        bias_init: Initializer | None = None,
        gathered: bool = False,
    ) -> None:
        super().__init__(
            d_in,
            sum(outputs.values()),
            bias=bias,
            gather_output=False,
            skip_bias_add=True,
            disable_grad_reduce=gathered,
            **(replace(parallel, sequence=False) if gathered else parallel).megatron_options(),
        )
        self.whole = parallel.size == 1
        self.sizes = [size // parallel.size for size in outputs.values()]
        inits = weight_init if isinstance(weight_init, Mapping) else dict.fromkeys(outputs, weight_init)
        self._describe(self.weight, "weight", outputs, parallel, inits)
        if bias:
            self._describe(self.bias, "bias", outputs, parallel, dict.fromkeys(outputs, bias_init or zeros))

    def _describe(
        self,
        parameter: Tensor,
        kind: str,
        outputs: Mapping[str, int],
        parallel: TensorParallel,
        inits: Mapping[str, Initializer],
    ) -> None:
        """Describe weight or bias: one block of rows per output, one below the other."""
        row, starts = tuple(parameter.shape[1:]), accumulate(self.sizes, initial=0)
        parts = [
            Part(
                f"{name}.{kind}",
                torch.Size((size, *row)),
                inits[name],
                (parallel.rank * local, *(0,) * len(row)),
                torch.Size((local, *row)),
                start * math.prod(row),
            )
            for (name, size), local, start in zip(outputs.items(), self.sizes, starts, strict=False)
        ]
        describe_parameter(parameter, ParameterInfo(tuple(parts), split=parallel.size > 1, divisible=True))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """[S, B, d_in] (under sequence parallelism [S / tensor, B, d_in]) -> one [S, B, d_out / tensor] per output."""
        if self.whole:
            y = F.linear(x, self.weight, self.bias)
        else:
            y, bias = super().forward(x)
            if bias is not None:  # added here: megatron-core 0.16.1 loses the bias's gradient if the weight is frozen
                y = y + bias
        return y.split(self.sizes, dim=-1)


class RowLinear(RowParallelLinear):
    """A linear map whose input is split over the tensor-parallel ranks; the output is summed over them."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        name: str,
        parallel: TensorParallel,
        *,
        bias: bool,
        weight_init: Initializer,
        bias_init: Initializer | None = None,
    ) -> None:
        super().__init__(
            d_in,
            d_out,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            **parallel.megatron_options(),
        )
        self.whole = parallel.size == 1
        describe_split(self.weight, f"{name}.weight", (d_out, d_in), 1, parallel, weight_init)
        if bias:
            describe_replicated(self.bias, f"{name}.bias", bias_init or zeros, partial_gradient=parallel.sequence)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[S, B, d_in / tensor] -> [S, B, d_out], or [S / tensor, B, d_out] under sequence parallelism."""
        return F.linear(x, self.weight, self.bias) if self.whole else super().forward(x)[0]


class Embedding(VocabParallelEmbedding):
    """Token embedding, split over the tensor-parallel ranks by vocabulary."""

    def __init__(self, vocab_size: int, d_model: int, parallel: TensorParallel, *, weight_init: Initializer) -> None:
        super().__init__(vocab_size, d_model, **parallel.megatron_options())
        self.whole = parallel.size == 1
        describe_split(self.weight, "weight", (vocab_size, d_model), 0, parallel, weight_init)

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """int64 [B, S] -> [S, B, d], whole on every rank."""
        tokens = tokens.t().contiguous()  # makes the result contiguous
        return F.embedding(tokens, self.weight) if self.whole else super().forward(tokens)


class Linear(nn.Linear):
    """A linear map that every tensor-parallel rank holds whole; `partial_gradient` if applied to sequence shards."""

    def __init__(self, d_in: int, d_out: int, *, weight_init: Initializer, partial_gradient: bool) -> None:
        super().__init__(d_in, d_out)
        describe_replicated(self.weight, "weight", weight_init, partial_gradient)
        describe_replicated(self.bias, "bias", zeros, partial_gradient)
