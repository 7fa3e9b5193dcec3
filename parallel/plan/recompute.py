"""Choose the blocks that recompute activations in the backward pass instead of keeping them."""

from collections.abc import Iterable

from model.costs import Unit
from parallel.config import ParallelConfig


def mark_recomputed(units: Iterable[tuple[str, Unit]], config: ParallelConfig) -> None:
    """Set `Unit.recompute` of the blocks that `parallel.recompute` and `parallel.recompute_stacks` choose."""
    kind = "block" if config.recompute == "every_n" else config.recompute
    every = {"none": 0, "every_n": config.recompute_every}.get(config.recompute, 1)
    prefixes = tuple(f"{stack}_block_" for stack in config.recompute_stacks)
    for name, unit in units:
        if every and name.startswith(prefixes) and int(name.rsplit("_", 1)[1]) % every == 0:
            unit.recompute = kind
