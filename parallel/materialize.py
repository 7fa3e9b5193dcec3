"""From a plan on `meta` to initialised parameters, one unit at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from errors import ConfigurationError
from model.config import ModelConfig, MT5Config, ViTConfig
from model.pali import PaLI, freeze, initialize, units
from parallel.layout import Layout


def materialize(
    vit: ViTConfig,
    mt5: MT5Config,
    model: ModelConfig,
    *,
    layout: Layout,
    num_objectives: int,
    dtype: torch.dtype,
    frozen: Sequence[str],
    seed: int,
    place: Callable[[nn.Module], None] = lambda unit: None,
) -> PaLI:
    """Plan the units on `meta`, freeze, then fill them one by one on this rank's device in `dtype`.

    `place` is called with each filled unit (ZeRO-3 shards it there), so that no more than one unit is ever whole on a
    rank.
    """
    with torch.device("meta"):
        pali = PaLI(units(vit, mt5, model, num_objectives, layout.tensor_parallel), layout.config.recompute == "block")
    freeze(pali, frozen)
    if not any(p.requires_grad for p in pali.parameters()):
        raise ConfigurationError(f"The freeze patterns {list(frozen)} leave nothing to train; remove one.")
    for name, unit in pali.units():
        _to_empty(unit, layout.device, dtype)
        initialize(unit, seed, name)
        place(unit)
    return pali


def _to_empty(unit: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Real memory for meta parameters; what layers said of a parameter stays with it."""
    for module in unit.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty_like(old, device=device, dtype=dtype), requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(module, name, new)
