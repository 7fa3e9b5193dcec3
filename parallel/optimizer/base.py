"""The common part of the sharded optimizers: they update flat shards, as rectangles of logical tensors."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.weights.big_vision import Layout
from parallel.config import OPTIMIZERS, OptimizerConfig
from parallel.file_backed import Disk
from parallel.optimizer.parameter_groups import matching_group
from parallel.shards import Rectangle

AVERAGE = "/average"  # end of the name of a logical tensor's average in a checkpoint


class Update(NamedTuple):
    """A rectangle to update: its fp32 weights and its gradient, both of the rectangle's size."""

    rectangle: Rectangle
    weights: Tensor
    gradient: Tensor


class StatePiece(NamedTuple):
    """A tensor of a checkpoint, or this rank's piece of it; `values` share the memory of the live state."""

    name: str
    where: Rectangle | torch.Size  # the piece of a logical tensor, or the shape of a tensor that every rank has whole
    values: Tensor


@dataclass
class Shard:
    """One flat fp32 tensor that an optimizer updates, and the rectangles of logical tensors in it."""

    weights: Tensor
    rectangles: list[Rectangle]


def optimizer_class(config: OptimizerConfig) -> "type[ShardedOptimizer]":
    """Return the class that `optimizer.name` chooses."""
    module = import_module(f"parallel.optimizer.{config.name}")
    return cast("type[ShardedOptimizer]", getattr(module, OPTIMIZERS[config.name]))


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over flat shards of logical tensors.

    An engine makes the shards, passes them to `bind`, sets `.grad` on them and calls `step`. `ages` counts the
    updates of each logical tensor.
    """

    @staticmethod
    def bytes_per_element(config: OptimizerConfig) -> float:
        """Return the bytes of state for each trained element, for the memory model; 0 where they are negligible."""
        raise NotImplementedError

    @staticmethod
    def state_bytes(shape: torch.Size, config: OptimizerConfig) -> int:
        """Return the bytes of state of a logical tensor that every rank holds whole; none by default."""
        return 0

    @staticmethod
    def summed(shape: torch.Size, config: OptimizerConfig) -> tuple[int, ...]:
        """Return the fp32 numbers of a logical tensor in each all-reduce of an update; there is none by default."""
        return ()

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.config = config
        self.disk: Disk | None = None  # holds state that is as large as the weights, under NVMe offload
        self.ages: dict[str, int] = {}
        self.averages: dict[Rectangle, Tensor] = {}  # of the weights, where `average_decay` is set
        self.averaged: set[str] = set()  # logical tensors whose average holds something

    def bind(
        self,
        shards: list[Shard],
        shapes: dict[str, torch.Size],
        group: dist.ProcessGroup,
        layouts: Mapping[str, Layout] | None = None,
    ) -> None:
        """Take over the shards and make their state.

        `shapes`: every logical tensor that any rank of `group` updates, in the same order on each rank. `group`: the
        ranks that divide these tensors among them. `layouts`: dimensions in flax of those that have more than two.
        """
        self.shards, self.shapes, self.group, self.layouts = shards, shapes, group, layouts or {}
        self.ages = dict.fromkeys(shapes, 0)
        self.groups = {name: matching_group(name, self.config.groups) for name in shapes}
        self.make_state()
        if self.config.average_decay:
            self.averages = {r: self.zeros(r, shard.weights) for shard in self.shards for r in shard.rectangles}

    def zeros(self, r: Rectangle, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Make state of the size of a rectangle, on the device of `like` or on the disk."""
        return self.disk.zeros(r.size, dtype) if self.disk else torch.zeros(r.size, dtype=dtype, device=like.device)

    def make_state(self) -> None:
        """Make the state of all shards."""
        raise NotImplementedError

    def update(self, updates: list[Update]) -> None:
        """Update the weights in place; a collective of the group."""
        raise NotImplementedError

    def state_pieces(self) -> Iterator[StatePiece]:
        """Yield this rank's state, named `<logical tensor>/<kind>`."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient; a collective of the group."""
        given = {id(flat) for group in self.param_groups for flat in group["params"]}
        updates = [
            Update(r, r.view(shard.weights), r.view(shard.weights.grad))
            for shard in self.shards
            if id(shard.weights) in given and shard.weights.grad is not None
            for r in shard.rectangles
        ]
        self.update(updates)
        self.average(updates)
        for name in self.ages:
            self.ages[name] += 1

    def average(self, updates: Iterable[Update]) -> None:
        """Add the updated weights to their average; the first ones become it."""
        if not self.config.average_decay:
            return
        for r, weights, _ in updates:
            if r.name in self.averaged:
                self.averages[r].lerp_(weights, 1 - self.config.average_decay)
            else:
                self.averages[r].copy_(weights)
        self.averaged |= self.shapes.keys()

    def saved_pieces(self, every: bool) -> Iterator[StatePiece]:
        """Yield all state to save: that of the update, and the average of the weights.

        `every`: averages that hold nothing yet too, because a checkpoint is to fill them.
        """
        yield from self.state_pieces()
        for r, values in self.averages.items():
            if every or r.name in self.averaged:
                yield StatePiece(r.name + AVERAGE, r, values)

    def learning_rate(self, name: str) -> float:
        """Return the learning rate of a logical tensor's next update."""
        group = self.groups[name]
        warmed_up = min(1.0, (self.ages[name] + 1) / group.warmup_steps) if group.warmup_steps else 1.0
        return self.param_groups[0]["lr"] * group.learning_rate_factor * warmed_up

    def decay(self, r: Rectangle) -> float:
        """Return the weight decay of a rectangle, a factor of the learning rate; matrices only."""
        own = self.groups[r.name].weight_decay
        return (self.config.weight_decay if own is None else own) if len(r.shape) == 2 else 0.0

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the schedule's learning rate for the next update."""
        for group in self.param_groups:
            group["lr"] = learning_rate
