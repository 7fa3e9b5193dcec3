"""Adafactor exactly as T5X's (`t5x/adafactor.py`), on flat shards of tensor-parallel matrices.

Second moments of a matrix are kept as the means of its rows and of its columns (Shazeer & Stern 2018), of the whole
logical matrix: each rank sums its own elements, one all-reduce adds the sums of all matrices, a second one the sizes
of the updates.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fragments import Rectangle
from parallel.optimizer import ShardedOptimizer

EPSILON = 1e-30  # added to every squared gradient (T5X epsilon1)


@dataclass
class Moments:
    """Second moments of one matrix [R, C], the same on every rank: its row means [R] and its column means [C]."""

    rows: Tensor
    columns: Tensor


@dataclass
class Sums:
    """A tensor's sums, views of one buffer: of squared weights, of squared gradients by row and by column."""

    weights: Tensor
    rows: Tensor
    columns: Tensor


class Adafactor(ShardedOptimizer):
    """No momentum; beta2_t = 1 - (t + 1)^-decay_exponent; step scaled by the RMS of the weights; update RMS clipped."""

    def make_state(self) -> None:
        device = self.shards[0].weights.device
        self.moments = {
            name: Moments(*(torch.zeros(n, device=device) for n in shape))
            for name, shape in self.shapes.items()
            if self._factored(shape)
        }
        self.full = {
            r: torch.zeros(r.size, device=device)
            for shard in self.shards
            for r in shard.rectangles
            if r.name not in self.moments
        }

    def _factored(self, shape: torch.Size) -> bool:
        return len(shape) == 2 and min(shape) >= self.config.min_dim_size_to_factor

    def update(self, pieces: list[tuple[Rectangle, Tensor, Tensor]], learning_rate: float) -> None:
        buffer, sums = self._sum_buffer()
        for r, weights, gradient in pieces:
            if r.once:
                self._add_sums(sums[r.name], r, weights, gradient)
        dist.all_reduce(buffer, group=self.group)

        factors = {name: self._update_moments(name, sums[name]) for name in self.moments}
        for r, _, gradient in pieces:
            if r.name not in factors:
                mixing = self._mixing(r.name)
                self.full[r].mul_(1 - mixing).add_(gradient.float().square().add_(EPSILON), alpha=mixing)

        index = {name: i for i, name in enumerate(self.shapes)}
        update_sums = buffer.new_zeros(len(index))
        for r, _, gradient in pieces:
            if r.once:
                update_sums[index[r.name]] += self._squared_update(r, gradient, factors)
        dist.all_reduce(update_sums, group=self.group)

        scales = self._scales(sums, update_sums, learning_rate)
        for r, weights, gradient in pieces:
            if self.config.weight_decay and len(r.shape) == 2:
                weights.mul_(1 - learning_rate * self.config.weight_decay)
            self._apply(r, weights, gradient, factors, scales[index[r.name]])

    def _sum_buffer(self) -> tuple[Tensor, dict[str, Sums]]:
        sizes = {name: (1, *(shape if name in self.moments else (0, 0))) for name, shape in self.shapes.items()}
        buffer = torch.zeros(sum(map(sum, sizes.values())), device=self.shards[0].weights.device)
        pieces = iter(buffer.split([n for size in sizes.values() for n in size]))
        return buffer, {name: Sums(next(pieces), next(pieces), next(pieces)) for name in sizes}

    def _add_sums(self, sums: Sums, r: Rectangle, weights: Tensor, gradient: Tensor) -> None:
        for rows, w, g in _chunks(r, weights, gradient):
            sums.weights += w.square().sum()
            if r.name in self.moments:
                squared = g.float().square()
                sums.rows[rows] += squared.sum(1)
                sums.columns[_columns(r)] += squared.sum(0)

    def _mixing(self, name: str) -> float:
        """1 - beta2 of this step."""
        return (self.ages[name] + 1.0) ** -self.config.decay_exponent

    def _update_moments(self, name: str, sums: Sums) -> tuple[Tensor, Tensor]:
        """New moments, and the factors (of rows, of columns) by which a gradient is multiplied."""
        num_rows, num_columns = self.shapes[name]
        moments, mixing = self.moments[name], self._mixing(name)
        moments.rows.lerp_(sums.rows / num_columns + EPSILON, mixing)
        moments.columns.lerp_(sums.columns / num_rows + EPSILON, mixing)
        return (moments.rows / moments.rows.mean()).rsqrt(), moments.columns.rsqrt()

    def _squared_update(self, r: Rectangle, gradient: Tensor, factors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        if r.name not in factors:
            return (gradient.float().square() / self.full[r]).sum()
        row_factor, column_factor = factors[r.name]
        column_factor = column_factor[_columns(r)].square()
        return torch.stack(
            [
                (g.float().square() @ column_factor) @ row_factor[rows].square()
                for rows, _, g in _chunks(r, gradient, gradient)
            ]
        ).sum()

    def _scales(self, sums: dict[str, Sums], update_sums: Tensor, learning_rate: float) -> Tensor:
        """Of every logical tensor: learning rate x max(RMS(weights), epsilon) / max(1, RMS(update) / clipping)."""
        counts = update_sums.new_tensor([shape.numel() for shape in self.shapes.values()])
        scales = torch.full_like(update_sums, learning_rate)
        if self.config.multiply_by_parameter_scale:
            weights = torch.cat([sums[name].weights for name in self.shapes])
            scales *= (weights / counts).sqrt().clamp(min=self.config.epsilon_scale)
        if self.config.update_clipping is not None:
            scales /= ((update_sums / counts).sqrt() / self.config.update_clipping).clamp(min=1.0)
        return scales

    def _apply(
        self, r: Rectangle, weights: Tensor, gradient: Tensor, factors: dict[str, tuple[Tensor, Tensor]], scale: Tensor
    ) -> None:
        if r.name not in factors:
            weights.sub_(gradient.float() * self.full[r].rsqrt() * scale)
            return
        row_factor, column_factor = factors[r.name]
        column_factor = column_factor[_columns(r)]
        for rows, w, g in _chunks(r, weights, gradient):
            w.addcmul_(g.float() * (row_factor[rows] * scale).unsqueeze(1), column_factor, value=-1)

    def state_pieces(self) -> Iterator[tuple[str, Rectangle | torch.Size, Tensor]]:
        for name, moments in self.moments.items():
            yield f"{name}/rows", moments.rows.shape, moments.rows
            yield f"{name}/columns", moments.columns.shape, moments.columns
        for r, values in self.full.items():
            yield f"{r.name}/second_moment", r, values


def _columns(r: Rectangle) -> slice:
    return slice(r.offset[1], r.offset[1] + r.size[1])


def _chunks(r: Rectangle, weights: Tensor, gradient: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(logical rows, weights, gradient) of pieces small enough for a CPU's cache; a GPU takes larger ones."""
    limit = 2**26 if weights.is_cuda else 2**17
    step = max(1, limit // r.size[-1]) if len(r.size) == 2 else max(1, r.size[0])
    for at in range(0, r.size[0], step):
        end = min(at + step, r.size[0])
        yield slice(r.offset[0] + at, r.offset[0] + end), weights[at:end], gradient[at:end]
