"""Adafactor exactly as T5X's (`t5x/adafactor.py`), on flat shards of tensor-parallel matrices.

Second moments of a matrix are kept as row means and column means (Shazeer & Stern 2018) of the whole logical matrix.
Each rank sums its own elements; one all-reduce adds the sums of all matrices, a second one the squared updates. Few
kernels update many tensors: the moments of all matrices are two flat tensors, and equal rectangles are stacked
(batches.py). Tensors too small to factor keep all second moments, and are updated as lists.

big_vision's variant (`optax.py::scale_by_adafactor`) adds momentum and an upper bound of beta2, and factors attention
kernels by head (`parallel/optimizer/factoring.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from model.weights.big_vision import Layout
from parallel.config import OptimizerConfig
from parallel.optimizer.base import ShardedOptimizer, StatePiece, Update
from parallel.optimizer.batches import (
    AT_ONCE,
    Batch,
    Listed,
    Places,
    add_at,
    make_batches,
    on_device,
    to_device,
)
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
        """See ShardedOptimizer.bytes_per_element: momentum in bf16; `state_bytes` has the means."""
        return 2.0 * bool(config.momentum)

    @staticmethod
    def state_bytes(shape: torch.Size, config: OptimizerConfig) -> int:
        """See ShardedOptimizer.state_bytes: of each row and column a mean, its count (fp32) and its block (int64)."""
        return 16 * means(shape, config)

    @staticmethod
    def summed(shape: torch.Size, config: OptimizerConfig) -> tuple[int, ...]:
        """See ShardedOptimizer.summed: squared weights, rows and columns of gradients; squared updates."""
        return 1 + means(shape, config), 1

    def make_state(self) -> None:
        """See ShardedOptimizer.make_state."""
        like = self.shards[0].weights
        self.index = {name: i for i, name in enumerate(self.shapes)}
        grids = {
            name: Grid.from_shape(shape, self.layouts.get(name), self.config) for name, shape in self.shapes.items()
        }
        self.grids = {name: grid.to(like.device) for name, grid in grids.items() if grid}
        self._make_moments(like.device)
        held = [r for shard in self.shards for r in shard.rectangles]
        self.full = {r: self.zeros(r, like) for r in held if r.name not in self.moments}
        kept = held if self.config.momentum else []
        self.momenta = {r: self.zeros(r, like, torch.bfloat16) for r in kept}
        self.counts = on_device([shape.numel() for shape in self.shapes.values()], like.device)
        self.batched: tuple[list[Rectangle], list[Batch]] = [], []
        self.listed: tuple[list[Rectangle], Listed] = [], Listed([], [], self.index, like.device)

    def _make_moments(self, device: torch.device) -> None:
        """Make the moments of whole matrices as two flat tensors, in the order of their numbers of rows."""
        names = sorted((n for n, grid in self.grids.items() if grid.whole), key=lambda n: self.shapes[n][0])
        self.matrices, shapes = names, [self.shapes[name] for name in names]
        rows, columns = ([shape[side] for shape in shapes] for side in (0, 1))
        self.row_means, self.column_means = (torch.zeros(sum(sizes), device=device) for sizes in (rows, columns))
        # A mean of rows is over the columns, and the other way round.
        self.of_rows, self.of_columns = _spread(columns, rows).to(device), _spread(rows, columns).to(device)
        self.alike = [(length, len(list(own))) for length, own in groupby(rows)]  # so many matrices of so many rows
        starts = [dict(zip(names, accumulate(sizes, initial=0), strict=False)) for sizes in (rows, columns)]
        self.places = Places(starts[0], starts[1], self.index)
        pairs = zip(self.row_means.split(rows), self.column_means.split(columns), strict=True)
        whole = {name: Moments(*pair) for name, pair in zip(names, pairs, strict=True)}
        self.moments = {
            name: whole.get(name) or Moments(*(torch.zeros(size, device=device) for size in grid.sizes))
            for name, grid in self.grids.items()
        }

    def update(self, updates: list[Update]) -> None:
        """Update moments and weights, with two all-reduces over the group."""
        matrices = [update for update in updates if update.rectangle.name in self.places.rows]
        blocked = [u for u in updates if u.rectangle.name in self.moments and u.rectangle.name not in self.places.rows]
        others = [update for update in updates if update.rectangle.name not in self.moments]
        batches, listed = self._batches(matrices), self._listed(others)
        gradients = [update.gradient for update in matrices]

        weight_sums, row_sums, column_sums, block_sums = self._sum(matrices, batches, blocked, listed, others)
        row_factors, column_factors = self._update_means(row_sums, column_sums)
        factors = {name: self._update_moments(name, *sums) for name, sums in block_sums.items()}
        scaled = self._scaled_gradients(others)
        update_sums = torch.zeros_like(weight_sums)
        squares = row_factors.square(), column_factors.square()
        for batch in batches:
            if batch.counted:
                add_at(update_sums, batch.names, _squared_updates(batch, gradients, *squares))
        for r, _, gradient in blocked:
            if r.counted:
                update_sums[self.index[r.name]] += self._squared_update(r, gradient, factors[r.name])
        listed.add(update_sums, scaled)
        sum_over(update_sums, self.group)

        steps, clips = self._steps(weight_sums, update_sums)
        self._decay(updates)
        for batch in batches:
            self._apply_batch(batch, matrices, gradients, row_factors, column_factors, steps, clips)
        for r, weights, gradient in blocked:
            number = self.index[r.name]
            self._apply(r, weights, gradient, factors[r.name], steps[number], clips[number])
        self._apply_all(others, scaled, listed, steps, clips)

    def _batches(self, matrices: list[Update]) -> list[Batch]:
        """Return the batches of these updates, made once for the same rectangles."""
        rectangles = [update.rectangle for update in matrices]
        if self.batched[0] != rectangles:
            self.batched = rectangles, make_batches(matrices, self.places)
        return self.batched[1]

    def _listed(self, others: list[Update]) -> Listed:
        """Return the places of these updates, made once for the same rectangles."""
        rectangles = [update.rectangle for update in others]
        if self.listed[0] != rectangles:
            sizes = [update.weights.numel() for update in others]
            self.listed = rectangles, Listed(rectangles, sizes, self.index, self.counts.device)
        return self.listed[1]

    def _sum(
        self, matrices: list[Update], batches: list[Batch], blocked: list[Update], listed: Listed,
        others: list[Update],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:  # fmt: skip
        """Sum over all ranks: squared weights of every tensor; squared gradients of matrices, by row and by column.

        Return those of whole matrices flat, and those of blocks by name.
        """
        names = [name for name in self.grids if name not in self.places.rows]
        sizes = [len(self.shapes), len(self.row_means), len(self.column_means)]
        sizes += [size.numel() for name in names for size in self.grids[name].sizes]
        buffer = torch.zeros(sum(sizes), device=self.shards[0].weights.device)
        weight_sums, row_sums, column_sums, *rest = buffer.split(sizes)
        block_sums = dict(zip(names, zip(rest[::2], rest[1::2], strict=True), strict=True))
        weights, gradients = [u.weights for u in matrices], [u.gradient for u in matrices]
        for batch in batches:
            if batch.counted:
                squared = batch.stack(gradients).float().square()
                add_at(row_sums, batch.rows, squared.sum(2))
                add_at(column_sums, batch.columns, squared.sum(1))
                add_at(weight_sums, batch.names, batch.stack(weights).square().sum((1, 2)))
        for r, w, gradient in blocked:
            if r.counted:
                for rows, part, g in _chunks(r, w, gradient):
                    self.grids[r.name].add(g.float().square(), rows, _columns(r), block_sums[r.name])
                    weight_sums[self.index[r.name]] += part.square().sum()
        listed.add(weight_sums, [weights for _, weights, _ in others])
        sum_over(buffer, self.group)
        return weight_sums, row_sums, column_sums, block_sums

    def _update_means(self, row_sums: Tensor, column_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Update the moments of whole matrices, and return the flat factors of rows and of columns."""
        mixing = [self._mixing(name) for name in self.matrices]
        for means, sums, numbers, side in (
            (self.row_means, row_sums, self.of_rows, 0),
            (self.column_means, column_sums, self.of_columns, 1),
        ):
            same = len(set(mixing)) <= 1  # as long as no tensor began later
            sizes = [self.shapes[name][side] for name in self.matrices]
            weight = (mixing or [1.0])[0] if same else to_device(_spread(mixing, sizes), means.device)
            means.lerp_(sums / numbers + EPSILON, weight)
        groups = self.row_means.split([length * number for length, number in self.alike])
        scaled = [
            (own.view(-1, length) / own.view(-1, length).mean(1, keepdim=True)).flatten()
            for own, (length, _) in zip(groups, self.alike, strict=True)
        ]
        return (torch.cat(scaled) if scaled else self.row_means).rsqrt(), self.column_means.rsqrt()

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

    def _steps(self, weight_sums: Tensor, update_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return two factors of every logical tensor's update, on the device: a step waits for it once, before.

        The step is learning rate x max(RMS(weights), epsilon), the clip 1 / max(1, RMS(update) / clipping).
        """
        steps = on_device([self.learning_rate(name) for name in self.shapes], self.counts.device)
        clips = torch.ones_like(steps)
        if self.config.multiply_by_parameter_scale:
            steps *= (weight_sums / self.counts).sqrt().clamp(min=self.config.epsilon_scale)
        if self.config.update_clipping is not None:
            clips /= ((update_sums / self.counts).sqrt() / self.config.update_clipping).clamp(min=1.0)
        return steps, clips

    def _squared_update(self, r: Rectangle, gradient: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        grid, columns = self.grids[r.name], _columns(r)
        chunks = [(rows, g.float()) for rows, _, g in _chunks(r, gradient, gradient)]
        return torch.stack([(g * grid.scale(rows, columns, factors)).square().sum() for rows, g in chunks]).sum()

    def _decay(self, updates: list[Update]) -> None:
        factors = [1 - self.learning_rate(r.name) * self.decay(r) for r, _, _ in updates]
        if any(factor != 1 for factor in factors):
            torch._foreach_mul_([update.weights for update in updates], factors)

    def _apply_batch(
        self, batch: Batch, matrices: list[Update], gradients: list[Tensor], row_factors: Tensor,
        column_factors: Tensor, steps: Tensor, clips: Tensor,
    ) -> None:  # fmt: skip
        weights = batch.chunks([update.weights for update in matrices])
        own_steps, own_clips = steps[batch.names].view(-1, 1, 1), clips[batch.names].view(-1, 1, 1)
        rows = batch.take_rows(row_factors).unsqueeze(2) * own_clips
        columns = batch.take_columns(column_factors).unsqueeze(1)
        if not self.momenta:
            rows *= own_steps
            if len(weights) == 1:
                weights[0].addcmul_((batch.stack(gradients).float() * rows)[0], columns[0], value=-1.0)
                return
        updates = (batch.stack(gradients).float() * rows).mul_(columns)
        if self.momenta:
            memories = batch.chunks([self.momenta[update.rectangle] for update in matrices])
            updates = self._averaged(memories, updates).mul_(own_steps)
        torch._foreach_sub_(weights, list(updates))

    def _apply(
        self, r: Rectangle, weights: Tensor, gradient: Tensor, factors: tuple[Tensor, Tensor], step: Tensor,
        clip: Tensor,
    ) -> None:  # fmt: skip
        for rows, w, g in _chunks(r, weights, gradient):
            factor = self.grids[r.name].scale(rows, _columns(r), factors)
            if not self.momenta:
                w.addcmul_(g.float() * (clip * step), factor, value=-1.0)
                continue
            at = rows.start - r.offset[0]
            (update,) = self._averaged([self.momenta[r][at : at + len(w)]], (g.float() * clip * factor).unsqueeze(0))
            w.sub_(update * step)

    def _apply_all(
        self, others: list[Update], scaled: list[Tensor], listed: Listed, steps: Tensor, clips: Tensor
    ) -> None:
        if not others:
            return
        flat = torch.cat([update.flatten() for update in scaled]).mul_(listed.spread(clips))
        if self.momenta:
            flat = self._averaged([self.momenta[r] for r, _, _ in others], flat)
        updates = flat.mul_(listed.spread(steps)).split(listed.sizes)
        weights = [update.weights for update in others]
        torch._foreach_sub_(weights, [u.view_as(w) for u, w in zip(updates, weights, strict=True)])

    def _averaged(self, memories: Sequence[Tensor], update: Tensor) -> Tensor:
        """Average an update with those before (optax `ema` without debiasing).

        `memories` keep the mean in bf16; they are the pieces of the flattened update, in its order.
        """
        pieces = [memory.view(-1) for memory in memories]
        kept = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        mean = update.lerp(kept.view_as(update).float(), self.config.momentum)
        torch._foreach_copy_(pieces, list(mean.view(-1).split([len(piece) for piece in pieces])))
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


def _spread(values: Sequence[float], numbers: Sequence[int]) -> Tensor:
    """Return fp32: each value so many times."""
    return torch.tensor(values, dtype=torch.float32).repeat_interleave(torch.tensor(numbers, dtype=torch.long))


def _squared_updates(batch: Batch, gradients: list[Tensor], row_factors: Tensor, column_factors: Tensor) -> Tensor:
    """Return [k], the sum of the squared update of each chunk; factors are squared."""
    squared, rows = batch.stack(gradients).float().square(), batch.take_rows(row_factors)
    columns = batch.take_columns(column_factors)
    if len(squared) == 1:
        return (squared[0] @ columns[0]) @ rows[0]
    return (rows.unsqueeze(1) @ (squared @ columns.unsqueeze(2))).flatten()


def _columns(r: Rectangle) -> slice:
    return slice(r.offset[1], r.offset[1] + r.size[1])


def _chunks(r: Rectangle, weights: Tensor, gradient: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (logical rows, weights, gradient) of chunks that fit a CPU's cache; larger chunks on a GPU."""
    step = max(1, AT_ONCE[weights.is_cuda] // r.size[-1])
    for at in range(0, r.size[0], step):
        end = min(at + step, r.size[0])
        yield slice(r.offset[0] + at, r.offset[0] + end), weights[at:end], gradient[at:end]
