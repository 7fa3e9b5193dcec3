"""First weights from files: towers that were pretrained elsewhere, or by `train.pretrain_vit`."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from errors import ConfigurationError
from model.layers import parts_of
from model.vit import resample_position
from parallel.checkpoint import held_weights
from parallel.engine import Engine

POSITION = "patches.position"  # resampled where the file's resolution is another


@torch.no_grad()
def load_files(engine: Engine, files: Sequence[str | Path]) -> None:
    """Fill parameters from safetensors files of logical names (`vit_block_0.mlp_in.hidden.weight`); others stay.

    Each rank reads only its rectangles. Raises ConfigurationError for a name that is no parameter of the model, or of
    another shape.
    """
    held = held_weights(engine)
    shapes = {part.name: part.shape for _, part in parts_of(engine.blueprint.plan)}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            names = set(opened.keys())
            for name in names:
                if name not in shapes:
                    raise ConfigurationError(f"{file} holds {name}, which is no parameter of this model.")
                found = torch.Size(opened.get_slice(name).get_shape())
                if found != shapes[name] and name != POSITION:
                    raise ConfigurationError(
                        f"{name} is {tuple(found)} in {file} and {tuple(shapes[name])} here; give the vit and mt5 it "
                        "was made with."
                    )
            for rectangle, values in held:
                if rectangle.name not in names:
                    continue
                where = tuple(slice(o, o + n) for o, n in zip(rectangle.offset, rectangle.size, strict=True))
                if rectangle.name == POSITION:
                    values.copy_(resample_position(opened.get_tensor(POSITION), rectangle.shape[0])[where])
                else:
                    values.copy_(opened.get_slice(rectangle.name)[where])
    engine.publish()
