"""Plan the whole model on `meta` and fill this rank's units from the plan, one at a time."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from common.progress import beat
from model.config import PaLIConfig
from model.costs import unit_costs
from model.layers import ParameterInfo, describe_parameter, parameter_parts
from model.pali import PaLI, initialize, plan_on_meta
from model.tensor_parallel import TensorParallel
from model.vit import VIT_UNITS
from parallel.config import OptimizerConfig
from parallel.layout import Layout
from parallel.optimizer.parameter_groups import check_groups
from parallel.plan.cut import StageCost, cut
from parallel.plan.memory import MemoryModel
from parallel.plan.recompute import mark_recomputed

Plan = tuple[PaLI, list[StageCost]]  # every unit of the model on `meta`, and the stages that they are cut into
ShardUnit = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Blueprint:
    """Hold what an engine is built from: every unit of the model, and the stages that the units are cut into.

    `plan` holds the units of all ranks. They are on `meta`, except this rank's own once `materialize` has filled them.
    """

    config: PaLIConfig
    optimizer: OptimizerConfig
    layout: Layout
    dtype: torch.dtype
    plan: PaLI
    stages: list[StageCost]

    @property
    def local_stages(self) -> list[int]:
        """Numbers of this rank's stages; more than one when stages are interleaved."""
        group = self.layout.pipeline_group
        return list(range(group.rank(), len(self.stages), group.size()))


def plan_stages(
    config: PaLIConfig, frozen: Sequence[str], memory: MemoryModel, tensor_parallel: TensorParallel | None = None
) -> Plan:
    """Plan the whole model on `meta` and cut it into pipeline stages; starts nothing, so a login node can check it.

    Raises ConfigurationError for a pattern that matches no parameter, for patterns that freeze every parameter, and
    where `cut` finds no cut.
    """
    plan = plan_on_meta(config, frozen, tensor_parallel)
    mark_recomputed(plan.units(), memory.parallel)
    check_groups(memory.optimizer.groups, [part.name for _, part in parameter_parts(plan)])
    if not any(p.requires_grad for p in plan.parameters()):
        raise ConfigurationError(f"The freeze patterns {list(frozen)} leave nothing to train; remove one.")
    if memory.parallel.replicate_frozen_vit:
        _check_frozen_vit(plan)
    return plan, cut(list(unit_costs(plan.units(), memory.step.micro_batch)), memory)


def _check_frozen_vit(plan: PaLI) -> None:
    trained = (name for name, unit in plan.units() if isinstance(unit, VIT_UNITS) and unit.trained)
    if (name := next(trained, None)) is not None:
        raise ConfigurationError(
            f"parallel.replicate_frozen_vit=true keeps a frozen ViT whole on each rank, but {name} is trained; set it "
            "to false where the ViT is trained (phases.NAME.replicate_frozen_vit=false for one phase)."
        )


def materialize(
    blueprint: Blueprint, seed: int | None, shard: ShardUnit = lambda unit: None, given: Collection[str] = ()
) -> PaLI:
    """Fill this rank's units one by one on its device, and return them.

    `seed=None` leaves parameters uninitialized; the caller must load every one, and so the logical tensors of `given`
    in any case. `shard` is called with each filled
    unit. ZeRO-3 shards it there, so a rank never holds more than one whole unit.
    """
    device, dtype = blueprint.layout.device, blueprint.dtype
    units = dict(blueprint.plan.units())
    names = [name for stage in blueprint.local_stages for name in blueprint.stages[stage].units]
    for name in names:
        beat(f"making {name}")
        _allocate(units[name], device, dtype)
        if seed is not None:
            initialize(units[name], seed, name, given)
        shard(units[name])
    beat("the model is made; its optimizer")
    model = PaLI({name: units[name] for name in names})
    if not any(p.requires_grad for p in model.parameters()):
        model.ballast = Ballast(device, dtype)
    return model


class Ballast(nn.Module):
    """Hold one parameter whose gradient is zero, for a stage whose own parameters are all frozen.

    Collectives of the optimizer include every rank -> a stage without a trained parameter would leave them waiting.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, device=device, dtype=dtype))
        describe_parameter(self.weight, ParameterInfo(parts=(), split=False))

    def forward(self) -> Tensor:
        """Return zero, with a gradient path to the parameter."""
        return 0 * self.weight.sum()


def _allocate(unit: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace parameters on `meta` by uninitialized memory; attributes such as logical parts stay attached."""
    for module in unit.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty_like(old, device=device, dtype=dtype), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, name, new)
