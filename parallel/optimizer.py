"""What the sharded optimizers share: they update flat shards, and know which rectangles of which logical tensors those
are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import OptimizerConfig
from parallel.fragments import Rectangle


@dataclass
class Shard:
    """One flat fp32 tensor that an optimizer updates, and what lies in it."""

    weights: Tensor
    rectangles: list[Rectangle]


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over flat shards of logical tensors.

    DeepSpeed owns the life of the shards: it sets `.grad` on them and calls `step`. After it has made them, `bind`
    says what they are. `skip` makes steps do nothing. The age of a logical tensor is the number of updates that it has
    had.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self.config = config
        self.skip = False
        self.ages: dict[str, int] = {}

    def bind(self, shards: list[Shard], shapes: dict[str, torch.Size], group: dist.ProcessGroup) -> None:
        """`shapes`: every logical tensor that any rank of `group` (all who share these tensors) updates, in the same
        order on each."""
        self.shards, self.shapes, self.group = shards, shapes, group
        self.ages = dict.fromkeys(shapes, 0)
        self.make_state()

    def make_state(self) -> None:
        raise NotImplementedError

    def update(self, pieces: list[tuple[Rectangle, Tensor, Tensor]], learning_rate: float) -> None:
        """Update the weights of (rectangle, weights, gradient) in place."""
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
        self.update(pieces, self.param_groups[0]["lr"])
        for name in self.ages:
            self.ages[name] += 1

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate
