"""Adafactor exactly as T5X's (`t5x/adafactor.py`), on flat shards of tensor-parallel matrices.

Second moments of a matrix are kept as row means and column means (Shazeer & Stern 2018) of the whole logical matrix.
Each rank sums its own elements; one all-reduce adds the sums of all matrices, a second one the squared updates. Tensors
too small to factor keep all second moments, and few kernels update many of them.

big_vision's variant (`optax.py::scale_by_adafactor`) adds momentum and an upper bound of beta2, and factors attention
kernels by head (`parallel/optimizer/factoring.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.weights.big_vision import Layout
from parallel.config import OptimizerConfig
from parallel.optimizer.base import ShardedOptimizer, StatePiece, Update
from parallel.optimizer.factoring import Grid
from parallel.process_groups import sum_over
from parallel.shards import Rectangle

EPSILON = 1e-30  # added to every squared gradient (T5X epsilon1)


@dataclass
class Moments:
    """Second moments of one matrix, the same on every rank: means of its rows and of its columns (`Grid.sizes`)."""

    rows: Tensor
    columns: Tensor


class Adafactor(ShardedOptimizer):
    """beta2_t = 1 - (t + 1)^-decay_exponent; the step is scaled by the RMS of the weights, the update RMS clipped."""

    @staticmethod
    def bytes_per_element(config: OptimizerConfig) -> float:
        """See ShardedOptimizer.bytes_per_element: momentum in bf16; row and column means are negligible."""
        return 2.0 * bool(config.momentum)

    def make_state(self) -> None:
        """See ShardedOptimizer.make_state."""
        like = self.shards[0].weights
        self.index = {name: i for i, name in enumerate(self.shapes)}
        grids = {
            name: Grid.from_shape(shape, self.layouts.get(name), self.config) for name, shape in self.shapes.items()
        }
        self.grids = {name: grid.to(like.device) for name, grid in grids.items() if grid}
        self.moments = {
            name: Moments(*(torch.zeros(size, device=like.device) for size in grid.sizes))
            for name, grid in self.grids.items()
        }
        held = [r for shard in self.shards for r in shard.rectangles]
        self.full = {r: self.zeros(r, like) for r in held if r.name not in self.moments}
        kept = held if self.config.momentum else []
        self.momenta = {r: self.zeros(r, like, torch.bfloat16) for r in kept}

    def update(self, updates: list[Update]) -> None:
        """Update moments and weights, with two all-reduces over the group."""
        matrices = [update for update in updates if update.rectangle.name in self.moments]
        others = [update for update in updates if update.rectangle.name not in self.moments]

        weight_sums, moment_sums = self._sum(matrices, others)
        factors = {name: self._update_moments(name, *sums) for name, sums in moment_sums.items()}
        scaled = self._scaled_gradients(others)
        update_sums = torch.zeros_like(weight_sums)
        for r, _, gradient in matrices:
            if r.counted:
                update_sums[self.index[r.name]] += self._squared_update(r, gradient, factors[r.name])
        self._add(update_sums, [(r, u) for (r, _, _), u in zip(others, scaled, strict=True)])
        sum_over(update_sums, self.group)

        steps, clips = self._steps(weight_sums, update_sums)
        for r, weights, _ in updates:
            if decay := self.decay(r):
                weights.mul_(1 - self.learning_rate(r.name) * decay)
        for r, weights, gradient in matrices:
            self._apply(r, weights, gradient, factors[r.name], steps[r.name], clips[r.name])
        self._apply_all(others, scaled, steps, clips)

    def _sum(self, matrices: list[Update], others: list[Update]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Sum over all ranks: squared weights of every tensor; squared gradients of matrices, by row and by column."""
        sizes = [len(self.shapes), *(size.numel() for grid in self.grids.values() for size in grid.sizes)]
        buffer = torch.zeros(sum(sizes), device=self.shards[0].weights.device)
        weight_sums, *rest = buffer.split(sizes)
        moment_sums = dict(zip(self.moments, zip(rest[::2], rest[1::2], strict=True), strict=True))
        for r, weights, gradient in matrices:
            if r.counted:
                for rows, w, g in _chunks(r, weights, gradient):
                    self.grids[r.name].add(g.float().square(), rows, _columns(r), moment_sums[r.name])
                    weight_sums[self.index[r.name]] += w.square().sum()
        self._add(weight_sums, [(r, weights) for r, weights, _ in others])
        sum_over(buffer, self.group)
        return weight_sums, moment_sums

    def _add(self, sums: Tensor, values: list[tuple[Rectangle, Tensor]]) -> None:
        """Add to each tensor's sum the squares of the values that this rank counts."""
        counted = [(self.index[r.name], x) for r, x in values if r.counted]
        if counted:
            index, tensors = zip(*counted, strict=True)
            sums.index_put_((torch.tensor(index, device=sums.device),), _squared_sums(tensors), accumulate=True)

    def _mixing(self, name: str) -> float:
        """Return 1 - beta2 of this step."""
        return max((self.ages[name] + 1.0) ** -self.config.decay_exponent, 1 - self.config.beta2_cap)

    def _update_moments(self, name: str, row_sums: Tensor, column_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Update the moments, and return the factors (of rows, of columns) that scale a gradient."""
        moments, mixing, grid = self.moments[name], self._mixing(name), self.grids[name]
        num_rows, num_columns = grid.block
        moments.rows.lerp_(row_sums.view_as(moments.rows) / num_columns + EPSILON, mixing)
        moments.columns.lerp_(column_sums.view_as(moments.columns) / num_rows + EPSILON, mixing)
        return grid.factors(moments.rows, moments.columns)

    def _scaled_gradients(self, others: list[Update]) -> list[Tensor]:
        """Update the moments of tensors that are not factored, and return the gradients divided by their roots."""
        if not others:
            return []
        gradients = [gradient.float() for _, _, gradient in others]
        squared = torch._foreach_mul(gradients, gradients)
        torch._foreach_add_(squared, EPSILON)
        moments = [self.full[r] for r, _, _ in others]
        torch._foreach_lerp_(moments, squared, [self._mixing(r.name) for r, _, _ in others])
        scaled = torch._foreach_rsqrt(moments)
        torch._foreach_mul_(scaled, gradients)
        return list(scaled)

    def _steps(self, weight_sums: Tensor, update_sums: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Return two factors of every logical tensor's update.

        The step is learning rate x max(RMS(weights), epsilon), the clip 1 / max(1, RMS(update) / clipping).
        """
        counts = weight_sums.new_tensor([shape.numel() for shape in self.shapes.values()])
        steps = weight_sums.new_tensor([self.learning_rate(name) for name in self.shapes])
        clips = torch.ones_like(steps)
        if self.config.multiply_by_parameter_scale:
            steps *= (weight_sums / counts).sqrt().clamp(min=self.config.epsilon_scale)
        if self.config.update_clipping is not None:
            clips /= ((update_sums / counts).sqrt() / self.config.update_clipping).clamp(min=1.0)
        both = torch.stack([steps, clips]).tolist()
        return dict(zip(self.shapes, both[0], strict=True)), dict(zip(self.shapes, both[1], strict=True))

    def _squared_update(self, r: Rectangle, gradient: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        grid, columns = self.grids[r.name], _columns(r)
        chunks = [(rows, g.float()) for rows, _, g in _chunks(r, gradient, gradient)]
        if not grid.whole:
            return torch.stack([(g * grid.scale(rows, columns, factors)).square().sum() for rows, g in chunks]).sum()
        row_factor, column_factor = factors[0].square(), factors[1][columns].square()
        return torch.stack([(g.square() @ column_factor) @ row_factor[rows] for rows, g in chunks]).sum()

    def _apply(
        self,
        r: Rectangle,
        weights: Tensor,
        gradient: Tensor,
        factors: tuple[Tensor, Tensor],
        step: float,
        clip: float,
    ) -> None:
        row_factor, column_factor = factors[0] * clip, factors[1][..., _columns(r)]
        for rows, w, g in _chunks(r, weights, gradient):
            if self.grids[r.name].whole:
                update = g.float() * row_factor[rows].unsqueeze(1)
            else:
                update, column_factor = g.float() * clip, self.grids[r.name].scale(rows, _columns(r), factors)
            if not self.momenta:
                w.addcmul_(update, column_factor, value=-step)
                continue
            at = rows.start - r.offset[0]
            w.sub_(self._averaged(self.momenta[r][at : at + len(w)], update * column_factor), alpha=step)

    def _apply_all(
        self, others: list[Update], scaled: list[Tensor], steps: dict[str, float], clips: dict[str, float]
    ) -> None:
        if not others:
            return
        names = [update.rectangle.name for update in others]
        torch._foreach_mul_(scaled, [clips[name] for name in names])
        if self.momenta:
            scaled = [self._averaged(self.momenta[r], s) for (r, _, _), s in zip(others, scaled, strict=True)]
        torch._foreach_mul_(scaled, [-steps[name] for name in names])
        torch._foreach_add_([update.weights for update in others], scaled)

    def _averaged(self, memory: Tensor, update: Tensor) -> Tensor:
        """Average an update with those before (optax `ema` without debiasing); `memory` keeps the mean in bf16."""
        mean = update.lerp(memory.float(), self.config.momentum)
        memory.copy_(mean)
        return mean

    def state_pieces(self) -> Iterator[StatePiece]:
        """See ShardedOptimizer.state_pieces."""
        for name, moments in self.moments.items():
            yield StatePiece(f"{name}/rows", moments.rows.shape, moments.rows)
            yield StatePiece(f"{name}/columns", moments.columns.shape, moments.columns)
        for r, values in self.full.items():
            yield StatePiece(f"{r.name}/second_moment", r, values)
        for r, values in self.momenta.items():
            yield StatePiece(f"{r.name}/momentum", r, values)


def means(shape: torch.Size, config: OptimizerConfig, layout: Layout | None = None) -> int:
    """Return the number of row and column means of a logical tensor, 0 if all second moments are kept."""
    grid = Grid.from_shape(shape, layout, config)
    return sum(size.numel() for size in grid.sizes) if grid else 0


def state_bytes(
    shapes: Mapping[str, torch.Size], config: OptimizerConfig, layouts: Mapping[str, Layout] | None = None
) -> int:
    """Return the bytes of Adafactor's state of these logical tensors: fp32 second moments, bf16 momentum if any.

    Every rank has the moments of all factored matrices. `layouts`: as `ShardedOptimizer.bind` takes them.
    """
    moments = sum(means(shape, config, (layouts or {}).get(name)) or shape.numel() for name, shape in shapes.items())
    return 4 * moments + (2 * sum(shape.numel() for shape in shapes.values()) if config.momentum else 0)


def _squared_sums(tensors: tuple[Tensor, ...]) -> Tensor:
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(tensors)).square()
    return torch.stack([x.square().sum() for x in tensors])  # a CPU's norm sums one by one, with an error of 1e-5


def _columns(r: Rectangle) -> slice:
    return slice(r.offset[1], r.offset[1] + r.size[1])


def _chunks(r: Rectangle, weights: Tensor, gradient: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (logical rows, weights, gradient) of chunks that fit a CPU's cache; larger chunks on a GPU."""
    limit = 2**26 if weights.is_cuda else 2**17
    step = max(1, limit // r.size[-1])
    for at in range(0, r.size[0], step):
        end = min(at + step, r.size[0])
        yield slice(r.offset[0] + at, r.offset[0] + end), weights[at:end], gradient[at:end]
