"""Build a parallel model: the one place with the order of construction (docs/parallelism.md)."""

from collections.abc import Collection, Sequence

import torch

from model.config import PaLIConfig
from model.tensor_parallel import join_group
from parallel.config import OptimizerConfig
from parallel.engine.base import Engine
from parallel.engine.replicated import ReplicatedEngine
from parallel.engine.zero import ZeroEngine
from parallel.layout import Layout
from parallel.plan.blueprint import Blueprint, Plan, materialize, plan_stages
from parallel.plan.memory import MemoryModel, StepShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_engine(
    config: PaLIConfig,
    optimizer: OptimizerConfig,
    layout: Layout,
    *,
    precision: str = "fp32",
    freeze: Sequence[str] = (),
    seed: int | None = 0,
    step: StepShape | None = None,
    plan: Plan | None = None,
    given: Collection[str] = (),
) -> Engine:
    """Build a trainable model for a layout that is started; a collective of all ranks.

    Steps: plan on `meta` -> freeze -> mark recomputed blocks -> cut into stages -> start the engine's library -> fill
    unit by unit -> data-parallel engine -> optimizer state. The caller loads a checkpoint afterwards.

    `precision="bf16"` computes in bf16 and keeps fp32 weights in the optimizer. `seed=None` leaves parameters
    uninitialized; the caller must load every one. The caller loads the logical tensors of `given` too,
    so none of them is drawn. Stages are balanced for `step`, by default for rows of one example.
    `plan` is what the checks have planned for this rank with the same settings (steps 1 to 4); it is used up here.
    Raises ConfigurationError as `plan_stages` does.
    """
    dtype = DTYPES[precision]
    step = step or StepShape.from_one_example(config, layout.config, dtype)
    # 1. Plan all units on `meta`, in the shapes of this rank's tensor-parallel blocks: every rank has the whole list
    #    and none has its memory, so all ranks cut alike without a message. No group is needed: the checks do it.
    # 2. Freeze: costs (4) and ZeRO (7) depend on it; only trained parameters get fp32 copies and optimizer state.
    # 3. Mark recomputed blocks: costs (4) depend on what a unit keeps for its backward pass.
    # 4. Cut the list into pipeline stages.
    memory = MemoryModel(layout.config, optimizer, step, layout.data_parallel_size)
    units, stages = plan or plan_stages(config, freeze, memory, layout.tensor_parallel)
    join_group(units, layout.tensor_group)
    blueprint = Blueprint(config, optimizer, layout, dtype, units, stages)
    # 5. Start the engine's library: ZeRO-3 must be ready to shard before the first parameter has memory.
    kind = ZeroEngine if layout.config.zero_stage else ReplicatedEngine
    shard = kind.prepare(blueprint)
    # 6. Fill this rank's units, each sharded before the next is filled: no rank ever holds the whole model.
    model = materialize(blueprint, seed, shard, given)
    # 7. Make the data-parallel engine, and the pipeline around the stages.
    engine = kind(blueprint, model)
    # 8. Make optimizer state last: it lies where the engine has put the shards.
    engine.bind_optimizer()
    return engine
