"""From a plan on `meta` to initialised parameters, one unit at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.progress import beat
from model.config import ModelConfig, MT5Config, ViTConfig
from model.costs import BatchShape, unit_costs
from model.layers import ParameterInfo, TensorParallel, describe_parameter, parameter_parts
from model.pali import PaLI, freeze, initialize, units
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.layout import Layout
from parallel.optimizer.parameter_groups import check_groups
from parallel.plan.cut import StageCost, cut
from parallel.plan.memory import Memory, Work
from parallel.plan.recompute import mark_recomputed

TEXT_TOKENS = 32  # input and target text of an example of the paper's tables


@dataclass(frozen=True)
class Blueprint:
    """What an engine is built from: all units on `meta`, frozen, and the stages that they are cut into."""

    plan: PaLI
    stages: list[StageCost]
    num_objectives: int
    model: ModelConfig
    optimizer: OptimizerConfig
    layout: Layout
    dtype: torch.dtype
    seed: int | None  # None: weights are loaded, not drawn

    @property
    def local_stages(self) -> list[int]:
        """Numbers of this rank's stages; more than one when interleaved."""
        group = self.layout.pipeline_group
        return list(range(group.rank(), len(self.stages), group.size()))


def plan_of(
    vit: ViTConfig,
    mt5: MT5Config,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    *,
    frozen: Sequence[str],
    data_parallel_size: int,
    dtype: torch.dtype,
    work: Work | None = None,
    num_objectives: int = 1,
    tensor_parallel: TensorParallel | None = None,
) -> tuple[PaLI, list[StageCost]]:
    """The whole model on `meta`, frozen, and the stages that it is cut into; nothing need be started.

    `work`: the steps that stages are balanced, and memory is predicted, for; else rows of one example of the paper's.
    Raises ConfigurationError where a pattern matches nothing, or all, and where there is no such cut.
    """
    with torch.device("meta"):
        plan = PaLI(units(vit, mt5, model, num_objectives, tensor_parallel))
    freeze(plan, frozen)
    mark_recomputed(plan, parallel)
    check_groups(optimizer.groups, [part.name for _, part in parameter_parts(plan)])
    if not any(p.requires_grad for p in plan.parameters()):
        raise ConfigurationError(f"The freeze patterns {list(frozen)} leave nothing to train; remove one.")
    work = work or _example(vit, model, parallel)
    work = replace(work, shape=replace(work.shape, element_bytes=dtype.itemsize))
    memory = Memory(parallel, optimizer, work, data_parallel_size)
    return plan, cut(list(unit_costs(plan.units(), work.shape)), memory)


def _example(vit: ViTConfig, model: ModelConfig, parallel: ParallelConfig) -> Work:
    """Rows of one image and its text each, as many micro-batches as fill the pipeline."""
    rows, vision = parallel.micro_batch_size, vit.num_tokens(model.image_size)
    shape = BatchShape(rows, vision, rows, vision + TEXT_TOKENS, TEXT_TOKENS)
    return Work(shape, parallel.pipeline * parallel.virtual_stages)


def draw(
    vit: ViTConfig,
    mt5: MT5Config,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    layout: Layout,
    num_objectives: int,
    dtype: torch.dtype,
    frozen: Sequence[str],
    seed: int | None,
    work: Work | None = None,
) -> Blueprint:
    """Plan the whole model for a layout that is started; raises as `plan_of` does."""
    plan, stages = plan_of(
        vit,
        mt5,
        model,
        optimizer,
        layout.config,
        frozen=frozen,
        data_parallel_size=layout.data_parallel_size,
        dtype=dtype,
        work=work,
        num_objectives=num_objectives,
        tensor_parallel=layout.tensor_parallel,
    )
    return Blueprint(plan, stages, num_objectives, model, optimizer, layout, dtype, seed)


def materialize(blueprint: Blueprint, place: Callable[[nn.Module], None] = lambda unit: None) -> PaLI:
    """Fill this rank's units one by one on its device.

    `place` is called with each filled unit (ZeRO-3 shards it there), so that no more than one unit is ever whole on a
    rank.
    """
    device, dtype = blueprint.layout.device, blueprint.dtype
    everything = dict(blueprint.plan.units())
    names = [name for stage in blueprint.local_stages for name in blueprint.stages[stage].units]
    for name in names:
        beat(f"making {name}")
        _to_empty(everything[name], device, dtype)
        if blueprint.seed is not None:
            initialize(everything[name], blueprint.seed, name)
        place(everything[name])
    beat("the model is made; its optimizer")
    pali = PaLI({name: everything[name] for name in names})
    if not any(p.requires_grad for p in pali.parameters()):
        pali.ballast = Ballast(device, dtype)
    return pali


class Ballast(nn.Module):
    """Lets a stage of frozen parameters take part in the optimizer's collectives: a parameter whose gradient is
    zero."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, device=device, dtype=dtype))
        describe_parameter(self.weight, ParameterInfo(parts=(), split=False))

    def forward(self) -> Tensor:
        return 0 * self.weight.sum()


def _to_empty(unit: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Real memory for meta parameters; what layers said of a parameter stays with it."""
    for module in unit.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty_like(old, device=device, dtype=dtype), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, name, new)
