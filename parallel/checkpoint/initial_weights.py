"""Load first weights from files: towers pretrained elsewhere, or by `train.pretrain_vit`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from common.errors import ConfigurationError
from common.progress import beat
from model.layers import parameter_parts
from parallel.engine.base import Engine

FLOATING = ("F64", "F32", "F16", "BF16")  # quantized tensors are refused: their scales are not read


def check_files(plan: nn.Module, files: Sequence[str | Path], key: str = "run.initial_weights") -> None:
    """Raise ConfigurationError for a file that cannot be read, or holds a tensor that is not one of the model's.

    Only names, shapes and types in the files are read. `plan`: all units, possibly on `meta`. `key`: the setting that
    names the files.
    """
    parts = {part.name: part for _, part in parameter_parts(plan)}
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
            if name not in parts:
                raise ConfigurationError(f"{file} holds {name}, which is no parameter of this model; leave it out.")
            if not parts[name].fits(shape):
                raise ConfigurationError(
                    f"{name} is {tuple(shape)} in {file} and {tuple(parts[name].shape)} here; give the vit and mt5 "
                    "it was made with."
                )
            if kinds[name] not in FLOATING:
                raise ConfigurationError(
                    f"{name} is {kinds[name]} in {file}, which is no kind of weights; write it as one of "
                    f"{', '.join(FLOATING)}."
                )


def names_in(file: str | Path) -> set[str]:
    """Read the names of the tensors in a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return set(opened.keys())


@torch.no_grad()
def load_files(engine: Engine, files: Sequence[str | Path]) -> None:
    """Fill parameters from safetensors files of logical names (`vit_block_0.mlp_in.hidden.weight`).

    Parameters that no file names keep their values. Each rank reads only its rectangles. Raises ConfigurationError as
    `check_files` does.
    """
    check_files(engine.blueprint.plan, files)
    parts, held = {part.name: part for _, part in parameter_parts(engine.blueprint.plan)}, engine.held_weights()
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())
            for rectangle, values in held:
                if rectangle.name not in names:
                    continue
                beat(f"reading {rectangle.name} from {file}")
                stored = opened.get_slice(rectangle.name)
                if torch.Size(stored.get_shape()) != rectangle.shape:
                    stored = parts[rectangle.name].resampled(opened.get_tensor(rectangle.name))
                values.copy_(stored[rectangle.slices])
    engine.publish()
