"""The seam to Megatron-Core: the only file of `model/` that imports it.

Layers know which *logical* tensors their parameters hold. A parameter is a stack of row blocks (`Part`), each the
local block of one logical matrix: `ColumnLinear({"query": n, "key": n, "value": n})` is one matrix product, yet the
optimizer, the checkpoint and the initial values see three matrices, whatever the tensor-parallel size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Generator, Tensor, nn

Initializer = Callable[[Tensor, Generator], object]
AT_ONCE = 2**24  # elements; torch's truncated normal takes several times the memory of what it fills

if not torch.cuda.is_available():
    # megatron-core 0.16.1 allocates the buffers of sequence parallelism on torch.cuda.current_device(), under gloo too.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]


class OneProcess:
    """A tensor-parallel group of this process alone, which needs no torch.distributed.

    A layer that holds all of its matrix computes by itself: megatron-core 0.16.1 cannot before a group is started.
    """

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@dataclass
class TensorParallel:
    """The tensor-parallel group that layers are built for; `sequence` splits what is between along the sequence."""

    group: Any = field(default_factory=OneProcess)
    sequence: bool = False

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def megatron(self) -> ModelParallelConfig:
        return ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            sequence_parallel=self.sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.get_default_dtype(),
            gradient_accumulation_fusion=False,
        )

    def padding(self, length: int) -> int:
        """Positions that a sequence lacks to be split evenly over the ranks."""
        return -length % self.size if self.sequence else 0

    def scatter(self, x: Tensor) -> Tensor:
        """[S, ...] on every rank -> this rank's [S / tensor, ...] under sequence parallelism."""
        return scatter_to_sequence_parallel_region(x, group=self.group) if self.sequence else x

    def gather(self, x: Tensor, partial_gradient: bool) -> Tensor:
        """Undo `scatter`; `partial_gradient`: ranks go on with different numbers, so gradients add up backwards."""
        if self.size == 1:
            return x
        if not self.sequence:
            return copy_to_tensor_model_parallel_region(x, group=self.group) if partial_gradient else x
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=partial_gradient, group=self.group)


@dataclass(frozen=True)
class Part:
    """This rank's block of one logical tensor, as it lies in a parameter.

    `name` is relative to the module; elements [start, start + block.numel()) of the flattened parameter are the
    block, which sits at `offset` of the logical tensor of `shape`.
    """

    name: str
    shape: torch.Size
    initialize: Initializer
    offset: tuple[int, ...]
    block: torch.Size
    start: int = 0


def describe_parameter(parameter: Tensor, parts: list[Part], split: bool, partial_gradient: bool = False) -> None:
    """Attach what optimizer, checkpoint and initialisation ask of a parameter.

    `split`: tensor-parallel ranks hold different elements. `partial_gradient`: under sequence parallelism each rank
    sees a part of the sequence, so gradients must be summed over the tensor-parallel group.
    """
    parameter.parts, parameter.split, parameter.partial_gradient = tuple(parts), split, partial_gradient  # type: ignore


def replicated(parameter: Tensor, name: str, initialize: Initializer, partial_gradient: bool = False) -> None:
    """Describe a parameter that every tensor-parallel rank holds whole."""
    shape = parameter.shape
    describe_parameter(parameter, [Part(name, shape, initialize, (0,) * len(shape), shape)], False, partial_gradient)


def parts_of(module: nn.Module, name: str = "") -> Iterator[tuple[nn.Parameter, Part]]:
    """Every (parameter, part) of a module of that name, parts with their full logical names. Raises if one has none."""
    for prefix, child in module.named_modules(prefix=name):
        for own, parameter in child.named_parameters(recurse=False):
            if not hasattr(parameter, "parts"):
                raise RuntimeError(f"parameter {prefix}.{own} has no logical parts: describe it where it is made")
            for part in parameter.parts:
                yield parameter, replace(part, name=f"{prefix}.{part.name}" if prefix else part.name)


class ColumnLinear(ColumnParallelLinear):
    """Several linear maps of one input in one matrix product, their outputs split over the tensor-parallel ranks.

    Forward: [S, B, d_in] (under sequence parallelism [S / tensor, B, d_in]) -> one [S, B, d_out / tensor] per output.
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
    ) -> None:
        super().__init__(
            d_in,
            sum(outputs.values()),
            config=parallel.megatron(),
            init_method=nn.init.zeros_,
            bias=bias,
            gather_output=False,
            skip_bias_add=True,
            tp_group=parallel.group,
        )
        self.whole = parallel.size == 1
        self.sizes = [size // parallel.size for size in outputs.values()]
        starts = [0, *accumulate(self.sizes)]

        def parts(kind: str, row: tuple[int, ...], initialize: Initializer | Mapping[str, Initializer]) -> list[Part]:
            return [
                Part(
                    f"{name}.{kind}",
                    torch.Size((size, *row)),
                    initialize[name] if isinstance(initialize, Mapping) else initialize,
                    (parallel.rank * local, *(0,) * len(row)),
                    torch.Size((local, *row)),
                    start * math.prod(row),
                )
                for (name, size), local, start in zip(outputs.items(), self.sizes, starts, strict=False)
            ]

        describe_parameter(self.weight, parts("weight", (d_in,), weight_init), split=True)
        if bias:
            describe_parameter(self.bias, parts("bias", (), bias_init or zeros), split=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if self.whole:
            y = F.linear(x, self.weight, self.bias)
        else:
            y, bias = super().forward(x)
            if bias is not None:  # added here: megatron-core 0.16.1 forgets its gradient where the weight is frozen
                y = y + bias
        return y.split(self.sizes, dim=-1)


class RowLinear(RowParallelLinear):
    """A linear map whose input is split over the tensor-parallel ranks: [S, B, d_in / tensor] -> [S, B, d_out].

    Under sequence parallelism the result is reduce-scattered: [S / tensor, B, d_out].
    """

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
            config=parallel.megatron(),
            init_method=nn.init.zeros_,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=parallel.group,
        )
        self.whole = parallel.size == 1
        local = d_in // parallel.size
        part = Part(
            f"{name}.weight",
            torch.Size((d_out, d_in)),
            weight_init,
            (0, parallel.rank * local),
            torch.Size((d_out, local)),
        )
        describe_parameter(self.weight, [part], split=True)
        if bias:
            replicated(self.bias, f"{name}.bias", bias_init or zeros, partial_gradient=parallel.sequence)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight, self.bias) if self.whole else super().forward(x)[0]


class Embedding(VocabParallelEmbedding):
    """Token embedding split by vocabulary: int64 [B, S] -> [S, B, d] on every rank."""

    def __init__(self, vocab_size: int, d_model: int, parallel: TensorParallel, *, weight_init: Initializer) -> None:
        super().__init__(
            vocab_size, d_model, init_method=nn.init.zeros_, config=parallel.megatron(), tp_group=parallel.group
        )
        self.whole = parallel.size == 1
        describe_parameter(
            self.weight, [vocabulary_part("weight", vocab_size, d_model, parallel, weight_init)], split=True
        )

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        tokens = tokens.t().contiguous()  # so that what is looked up is too
        return F.embedding(tokens, self.weight) if self.whole else super().forward(tokens)


def vocabulary_part(
    name: str, vocab_size: int, d_model: int, parallel: TensorParallel, initialize: Initializer
) -> Part:
    """A [vocab_size, d_model] matrix split by rows."""
    local = vocab_size // parallel.size
    return Part(
        name, torch.Size((vocab_size, d_model)), initialize, (parallel.rank * local, 0), torch.Size((local, d_model))
    )


class Linear(nn.Linear):
    """A linear map that every tensor-parallel rank holds whole; `partial_gradient` where applied to sequence shards."""

    def __init__(self, d_in: int, d_out: int, *, weight_init: Initializer, partial_gradient: bool) -> None:
        super().__init__(d_in, d_out)
        replicated(self.weight, "weight", weight_init, partial_gradient)
        replicated(self.bias, "bias", zeros, partial_gradient)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with eps 1e-6 (flax default, big_vision ViT)."""

    def __init__(self, width: int, parallel: TensorParallel) -> None:
        super().__init__(width, eps=1e-6)
        replicated(self.weight, "weight", ones, parallel.sequence)
        replicated(self.bias, "bias", zeros, parallel.sequence)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, eps 1e-6, statistics in fp32 (T5X `layers.py::LayerNorm`)."""

    def __init__(self, width: int, parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        replicated(self.weight, "weight", ones, parallel.sequence)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Turn sequence parallelism off for a while: a decoding step has one token, which cannot be split."""
    layers = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    seen = (getattr(m, "parallel", None) for m in model.modules())
    parallels = [parallel for parallel in seen if isinstance(parallel, TensorParallel)]
    was = any(layer.sequence_parallel for layer in layers)

    def switch(on: bool) -> None:
        for parallel in parallels:
            parallel.sequence = on
        for layer in layers:
            layer.sequence_parallel = on

    switch(False)
    try:
        yield
    finally:
        switch(was)


def zeros(x: Tensor, _: Generator) -> Tensor:
    return x.zero_()


def ones(x: Tensor, _: Generator) -> Tensor:
    return x.fill_(1.0)


def normal(std: float) -> Initializer:
    return lambda x, generator: x.normal_(0.0, std, generator=generator)


def xavier_uniform(x: Tensor, generator: Generator) -> Tensor:
    """flax `xavier_uniform`, which big_vision's ViT uses for every kernel."""
    return nn.init.xavier_uniform_(x, generator=generator)


def fan_in_normal(x: Tensor, generator: Generator) -> Tensor:
    """flax `variance_scaling(1.0, "fan_in", "normal")` of a [d_out, d_in] matrix (T5X attention kernels)."""
    return x.normal_(0.0, x.shape[1] ** -0.5, generator=generator)


def fan_in_truncated(x: Tensor, generator: Generator) -> Tensor:
    """flax `variance_scaling(1.0, "fan_in", "truncated_normal")`: cut at 2 sigma, unit variance (T5X MLP, logits)."""
    std = x.shape[1] ** -0.5 / 0.87962566103423978
    for rows in x.split(max(1, AT_ONCE // x.shape[1])):
        nn.init.trunc_normal_(rows, 0.0, std, -2 * std, 2 * std, generator=generator)
    return x
