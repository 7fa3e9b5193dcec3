"""Convert one step's data into the micro-batches of tensors that the engine takes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from data.examples import ExampleInfo
from data.objectives import NAMES
from data.packing import Rows
from data.stream import StepData
from model.attention.blocks import BLOCK
from model.batch import MicroBatch
from train.config import RunConfig
from train.step.reduction import RankStats

LONGEST_TEXT = 200  # characters of a text that `identify` keeps


def to_tensors(rows: Rows) -> MicroBatch:
    """Convert packed rows to tensors on the host."""
    return MicroBatch.from_rows(cast(dict[str, np.ndarray], rows))


def pins(device: torch.device) -> bool:
    """Return whether tensors for a device are page-locked, so that copies to it run beside its work."""
    return device.type == "cuda" and torch.cuda.is_available()


def trim(batch: MicroBatch, config: RunConfig, device: torch.device) -> MicroBatch:
    """Drop image slots and trailing positions that no row uses; lengths become multiples of `data.trim_multiple`.

    On a GPU, they become multiples of the kernels' blocks too: a kernel is compiled for each length, and computes whole
    blocks anyway. A pipeline gets the batch unchanged, because its stages exchange tensors of one fixed shape. So does
    `data.trim_multiple=0`.
    """
    if config.data.trim_multiple == 0 or config.parallel.pipeline > 1:
        return batch
    multiple = config.data.trim_multiple if device.type == "cpu" else math.lcm(config.data.trim_multiple, BLOCK)
    return batch.trimmed(config.vit.num_tokens(config.model.image_size), multiple, pins(device))


def compact(batch: MicroBatch, config: RunConfig, device: torch.device) -> MicroBatch:
    """Drop padding that the loss does not need: trim the batch and, on a CPU, concatenate its rows into one.

    On a CPU, attention runs example by example, so one long row costs no more than several short ones. Dropout keeps
    the rows, because its masks are drawn per row; so do the two cases in which `trim` changes nothing.
    """
    batch, multiple = trim(batch, config, device), config.data.trim_multiple
    if config.pali.tower == "vit":  # no attention over rows
        return batch
    keeps_rows = multiple == 0 or config.parallel.pipeline > 1 or config.model.dropout_rate or device.type != "cpu"
    return batch if keeps_rows else batch.joined(multiple)


def rank_stats(data: StepData[MicroBatch], empty: MicroBatch | None, config: RunConfig) -> RankStats:
    """Count the rows that a leader read for a step; `empty` is the micro-batch that is added where others have more."""
    batches, tokens_per_image = data.micro_batches, config.vit.num_tokens(config.model.image_size)
    examples = Counter(info.objective for info in data.infos)
    components = Counter(info.component for info in data.infos)
    return RankStats(
        num_micro_batches=len(batches),
        # The loss of a classifier is a mean over images, one of each example.
        num_targets=sum(batch.num_examples if config.pali.tower == "vit" else batch.num_targets for batch in batches),
        encoder_tokens=sum(int((batch.encoder_segments > 0).sum()) for batch in batches),
        images=sum(int((batch.visual_index >= 0).sum()) for batch in batches) // tokens_per_image,
        examples={name: examples[name] for name in NAMES},
        components={name: components[name] for name in config.mixture},
        truncated=data.truncated,
        positions=sum(batch.num_positions for batch in batches),
        empty_positions=empty.num_positions if empty is not None else 0,
        skipped=data.skipped,
        error=data.error,
    )


def identify(infos: Sequence[ExampleInfo]) -> list[dict[str, Any]]:
    """Return the fields that find each example again: source, objective, shard, key and the beginnings of its texts."""
    names, texts = ("source", "objective", "shard", "key", "language"), ("input_text", "target_text")
    return [
        {name: getattr(info, name) for name in names} | {name: shorten(getattr(info, name)) for name in texts}
        for info in infos
    ]


def shorten(text: str) -> str:
    """Return the beginning of a text, with the number of characters that were dropped."""
    dropped = len(text) - LONGEST_TEXT
    return f"{text[:LONGEST_TEXT]} … ({dropped} more characters)" if dropped > 0 else text


def with_dropout(batches: Sequence[MicroBatch], *seeds: int) -> list[MicroBatch]:
    """Return the micro-batches with seeds of dropout, so that a resumed run drops what the interrupted one did.

    `seeds`: the run's, the step, and the data-parallel rank, whose examples are others.
    """
    drawn = np.random.SeedSequence(seeds).generate_state(len(batches), np.uint64)
    return [batch.seeded(int(seed)) for batch, seed in zip(batches, drawn, strict=True)]
