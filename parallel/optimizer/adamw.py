"""AdamW (Loshchilov & Hutter 2019) on flat shards, torch's own update; weight decay on matrices only."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.optimizer.base import Piece, ShardedOptimizer
from parallel.shards import Rectangle


class AdamW(ShardedOptimizer):
    """First and second moments of every element, where its weights are."""

    def make_state(self) -> None:
        everything = [(r, shard.weights) for shard in self.shards for r in shard.rectangles]
        self.first = {r: self.zeros(r, weights) for r, weights in everything}
        self.second = {r: self.zeros(r, weights) for r, weights in everything}

    def update(self, pieces: list[Piece]) -> None:
        alike: dict[tuple[float, float], list[Piece]] = {}
        for piece in pieces:
            alike.setdefault((self.rate(piece[0].name), self.decay(piece[0])), []).append(piece)
        for (learning_rate, decay), chosen in alike.items():
            adamw(
                [w for _, w, _ in chosen],
                [g.float() for _, _, g in chosen],
                [self.first[r] for r, _, _ in chosen],
                [self.second[r] for r, _, _ in chosen],
                [],
                [torch.tensor(float(self.ages[r.name])) for r, _, _ in chosen],
                foreach=True,
                amsgrad=False,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                lr=learning_rate,
                weight_decay=decay,
                eps=self.config.epsilon,
                maximize=False,
            )

    def state_pieces(self) -> Iterator[tuple[str, Rectangle | torch.Size, Tensor]]:
        for r, values in self.first.items():
            yield f"{r.name}/first_moment", r, values
        for r, values in self.second.items():
            yield f"{r.name}/second_moment", r, values
