"""First weights from files: towers that were pretrained elsewhere, or by `train.pretrain_vit`."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import ConfigurationError
from common.progress import beat
from model.layers import parts_of
from model.vit import resample_position
from parallel.checkpoint.checkpointer import held_weights
from parallel.engine.base import Engine

FLOATING = ("F64", "F32", "F16", "BF16")  # what is quantized means nothing without its scales
POSITION = "patches.position"  # resampled where the file's resolution is another


def check_files(plan: nn.Module, files: Sequence[str | Path], key: str = "run.initial_weights") -> None:
    """Raise ConfigurationError for a file that cannot be read, or holds what is no parameter of the model.

    `plan`: all units, be it on `meta`; only the names and shapes in the files are read. `key`: the setting that names
    the files.
    """
    shapes = {part.name: part.shape for _, part in parts_of(plan)}
    for file in files:
        if not Path(file).is_file():
            raise ConfigurationError(f"{key} names {file}, which is no file; make it or leave it out.")
        try:
            with safe_open(str(file), framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {name: torch.Size(each.get_shape()) for name, each in slices.items()}
                kinds = {name: each.get_dtype() for name, each in slices.items()}
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(
                f"{key} names {file}, which is no safetensors file ({error}); make it anew."
            ) from error
        for name, shape in found.items():
            if name not in shapes:
                raise ConfigurationError(f"{file} holds {name}, which is no parameter of this model; leave it out.")
            if shape != shapes[name] and not (name == POSITION and _is_square_grid(shape, shapes[name])):
                raise ConfigurationError(
                    f"{name} is {tuple(shape)} in {file} and {tuple(shapes[name])} here; give the vit and mt5 it was "
                    "made with."
                )
            if kinds[name] not in FLOATING:
                raise ConfigurationError(
                    f"{name} is {kinds[name]} in {file}, which is no kind of weights; write it as one of "
                    f"{', '.join(FLOATING)}."
                )


def _is_square_grid(shape: torch.Size, here: torch.Size) -> bool:
    """Whether position embeddings of another resolution can be resampled: n x n of them, as wide as here."""
    return len(shape) == 2 and shape[0] > 0 and math.isqrt(shape[0]) ** 2 == shape[0] and shape[1] == here[1]


def names_in(file: str | Path) -> set[str]:
    """Read the names of the tensors in a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return set(opened.keys())


@torch.no_grad()
def load_files(engine: Engine, files: Sequence[str | Path]) -> None:
    """Fill parameters from safetensors files of logical names (`vit_block_0.mlp_in.hidden.weight`); others stay.

    Each rank reads only its rectangles. Raises ConfigurationError as `check_files` does.
    """
    check_files(engine.blueprint.plan, files)
    held = held_weights(engine)
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())
            for rectangle, values in held:
                if rectangle.name not in names:
                    continue
                beat(f"reading {rectangle.name} from {file}")
                where = tuple(slice(o, o + n) for o, n in zip(rectangle.offset, rectangle.size, strict=True))
                if rectangle.name == POSITION:
                    values.copy_(resample_position(opened.get_tensor(POSITION), rectangle.shape[0])[where])
                else:
                    values.copy_(opened.get_slice(rectangle.name)[where])
    engine.publish()
