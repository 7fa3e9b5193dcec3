"""AdamW (Loshchilov & Hutter 2019) on flat shards, torch's own update; weight decay on matrices only."""

from collections.abc import Iterator

import torch
from torch.optim.adamw import adamw

from parallel.config import OptimizerConfig
from parallel.optimizer.base import ShardedOptimizer, StatePiece, Update


class AdamW(ShardedOptimizer):
    """AdamW, with first and second moments of every element next to its weights."""

    @staticmethod
    def bytes_per_element(config: OptimizerConfig) -> float:
        """See ShardedOptimizer.bytes_per_element: two fp32 moments."""
        return 8.0

    def make_state(self) -> None:
        """See ShardedOptimizer.make_state."""
        everything = [(r, shard.weights) for shard in self.shards for r in shard.rectangles]
        self.first = {r: self.zeros(r, weights) for r, weights in everything}
        self.second = {r: self.zeros(r, weights) for r, weights in everything}

    def update(self, updates: list[Update]) -> None:
        """Update rectangles of the same learning rate and decay in one call."""
        alike: dict[tuple[float, float], list[Update]] = {}
        for update in updates:
            r = update.rectangle
            alike.setdefault((self.learning_rate(r.name), self.decay(r)), []).append(update)
        for (learning_rate, decay), chosen in alike.items():
            adamw(
                [update.weights for update in chosen],
                [update.gradient.float() for update in chosen],
                [self.first[update.rectangle] for update in chosen],
                [self.second[update.rectangle] for update in chosen],
                [],
                [torch.tensor(float(self.ages[update.rectangle.name])) for update in chosen],
                foreach=True,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=learning_rate,
                weight_decay=decay,
                eps=self.config.epsilon,
                maximize=False,
            )

    def state_pieces(self) -> Iterator[StatePiece]:
        """See ShardedOptimizer.state_pieces."""
        for r, values in self.first.items():
            yield StatePiece(f"{r.name}/first_moment", r, values)
        for r, values in self.second.items():
            yield StatePiece(f"{r.name}/second_moment", r, values)
