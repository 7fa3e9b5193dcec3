"""Build the engine of one training phase from the run's configuration."""

import gc

import torch

from data.objectives import NAMES
from model.costs import BatchShape
from parallel.engine.base import Engine, build_engine
from parallel.layout import Layout
from parallel.plan.memory import Work
from train.config import Phase, RunConfig


def build_phase_engine(config: RunConfig, phase: Phase, layout: Layout, restored: bool) -> Engine:
    """Build the model as a phase trains it; `config` is that of the phase (`for_phase`).

    `restored`: every weight will be loaded afterwards, so none is initialized here.
    """
    gc.collect()  # an engine and its pipeline refer to each other -> free those of the phase before first
    if layout.device.type == "cuda":
        torch.cuda.empty_cache()
    return build_engine(
        config.vit, config.mt5, config.model, config.optimizer, layout=layout, num_objectives=len(NAMES),
        precision=config.run.precision, freeze=phase.freeze, seed=None if restored else config.run.seed,
        work=expected_step_shape(config, layout.data_parallel_size),
    )  # fmt: skip


def expected_step_shape(config: RunConfig, data_parallel_size: int) -> Work:
    """Return the shapes of a rank's step, before any row is read; `config` is that of the phase.

    Rows are taken to be as full as their image slots allow.
    """
    data, rows = config.data, config.parallel.micro_batch_size
    vision = config.vit.num_tokens(config.model.image_size)
    shape = BatchShape(rows * data.images_per_row, vision, rows, data.encoder_length, data.decoder_length)
    number = -(-data.global_batch_size // (data_parallel_size * rows * data.images_per_row))
    return Work(shape, number)
