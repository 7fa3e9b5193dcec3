"""What the sharded optimizers share: they update flat shards, and know which rectangles of which logical tensors those
are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import OptimizerConfig
from parallel.file_backed import Disk
from parallel.optimizer.parameter_groups import group_of
from parallel.shards import Rectangle

Piece = tuple[Rectangle, Tensor, Tensor]  # where it lies, its weights, its gradient


@dataclass
class Shard:
    """One flat fp32 tensor that an optimizer updates, and what lies in it."""

    weights: Tensor
    rectangles: list[Rectangle]


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over flat shards of logical tensors.

    An engine owns the life of the shards: it sets `.grad` on them and calls `step`. After it has made them, `bind`
    says what they are. `skip` makes steps do nothing. The age of a logical tensor is the number of updates that it has
    had.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.config = config
        self.skip = False
        self.disk: Disk | None = None  # where state lives that is as large as the weights
        self.ages: dict[str, int] = {}

    def bind(self, shards: list[Shard], shapes: dict[str, torch.Size], group: dist.ProcessGroup) -> None:
        """`shapes`: every logical tensor that any rank of `group` (all who share these tensors) updates, in the same
        order on each."""
        self.shards, self.shapes, self.group = shards, shapes, group
        self.ages = dict.fromkeys(shapes, 0)
        self.groups = {name: group_of(name, self.config.groups) for name in shapes}
        self.make_state()

    def zeros(self, r: Rectangle, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """New state of the size of a rectangle, where `like` is, or on the disk."""
        return self.disk.zeros(r.size, dtype) if self.disk else torch.zeros(r.size, dtype=dtype, device=like.device)

    def make_state(self) -> None:
        raise NotImplementedError

    def update(self, pieces: list[Piece]) -> None:
        """Update the weights in place."""
        raise NotImplementedError

    def state_pieces(self) -> Iterator[tuple[str, Rectangle | torch.Size, Tensor]]:
        """(state name, where it lies in the logical tensor or the shape of a state that every rank holds whole,
        values)."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every shard that has a gradient; collective over the group."""
        if self.skip:
            return
        given = {id(flat) for group in self.param_groups for flat in group["params"]}
        pieces = [
            (r, r.view(shard.weights), r.view(shard.weights.grad))
            for shard in self.shards
            if id(shard.weights) in given and shard.weights.grad is not None
            for r in shard.rectangles
        ]
        self.update(pieces)
        for name in self.ages:
            self.ages[name] += 1

    def rate(self, name: str) -> float:
        """The learning rate of a logical tensor's next update."""
        group = self.groups[name]
        warmed_up = min(1.0, (self.ages[name] + 1) / group.warmup_steps) if group.warmup_steps else 1.0
        return self.param_groups[0]["lr"] * group.learning_rate_factor * warmed_up

    def decay(self, r: Rectangle) -> float:
        """Weight decay, to be multiplied by the learning rate."""
        own = self.groups[r.name].weight_decay
        return (self.config.weight_decay if own is None else own) if len(r.shape) == 2 else 0.0

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate
