"""Build the engine of one training phase from the run's configuration."""

import gc
from collections.abc import Collection

import torch

from model.costs import BatchShape
from parallel.engine.base import Engine
from parallel.engine.build import DTYPES, build_engine
from parallel.layout import Layout, planned_tensor_parallel
from parallel.plan.blueprint import Plan, plan_stages
from parallel.plan.memory import MemoryModel, StepShape
from train.config import Phase, RunConfig


def build_phase_engine(
    config: RunConfig,
    phase: Phase,
    layout: Layout,
    restored: bool,
    plan: Plan | None = None,
    given: Collection[str] = (),
) -> Engine:
    """Build the model as a phase trains it; `config` is that of the phase (`for_phase`).

    `restored`: every weight will be loaded afterwards, so none is initialized here; `given`: logical tensors that will
    be, though not all are. `plan`: the phase's, of the checks.
    """
    gc.collect()  # an engine and its pipeline refer to each other -> free those of the phase before first
    if layout.device.type == "cuda":
        torch.cuda.empty_cache()
    return build_engine(
        config.pali,
        config.optimizer,
        layout.with_config(config.parallel),
        precision=config.run.precision,
        freeze=phase.freeze,
        seed=None if restored else config.run.seed,
        step=expected_step_shape(config, layout.data_parallel_size),
        plan=plan,
        given=given,
    )


def plan_phase(config: RunConfig, phase: Phase, world_size: int, rank: int) -> Plan:
    """Plan the model of a phase on `meta`, as a rank will hold it; `config` is that of the phase. Nothing is started.

    Raises ConfigurationError for each setting with which `build_phase_engine` would.
    """
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    step = expected_step_shape(config, data_parallel_size)
    memory = MemoryModel(config.parallel, config.optimizer, step, data_parallel_size)
    return plan_stages(config.pali, phase.freeze, memory, planned_tensor_parallel(config.parallel, rank))


def expected_step_shape(config: RunConfig, data_parallel_size: int) -> StepShape:
    """Return the shapes of a rank's step, before any row is read; `config` is that of the phase.

    Rows are taken to be as full as their image slots allow.
    """
    data, rows = config.data, config.parallel.micro_batch_size
    shape = BatchShape(
        images=rows * data.images_per_row,
        vision_tokens=config.pali.tokens_per_image,
        rows=rows,
        encoder_tokens=data.encoder_length,
        decoder_tokens=data.decoder_length,
        element_bytes=DTYPES[config.run.precision].itemsize,
    )
    number = -(-data.global_batch_size // (data_parallel_size * rows * max(1, data.images_per_row)))
    return StepShape(shape, number)
