"""Cross-entropy over a vocabulary of 250,112; the logits of at most one chunk of tokens exist at a time."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FEW_ROWS = 8  # of next_logits
ROWS_AT_ONCE = 2**15  # vocabulary rows; their fp32 gradient of one chunk exists beside the sum over chunks


@dataclass
class LossTotals:
    """Sums over target tokens, one entry per objective; fp32 [num_objectives] each."""

    nll: Tensor  # nats
    z_loss: Tensor  # nats
    correct: Tensor  # target tokens with the largest logit
    tokens: Tensor  # target tokens

    @classmethod
    def from_tensor(cls, totals: Tensor) -> "LossTotals":
        """Split the [4, num_objectives] tensor that the head returns, and that ranks add up."""
        return cls(*totals)

    def stacked(self) -> Tensor:
        """Return the tensor of `from_tensor`."""
        return torch.stack([self.nll, self.z_loss, self.correct, self.tokens])

    @property
    def loss(self) -> Tensor:
        """The mean over all target tokens, z-loss included; scalar."""
        return (self.nll + self.z_loss).sum() / self.tokens.sum().clamp(min=1)


class VocabularyLoss(torch.autograd.Function):
    """Vocabulary-parallel softmax cross-entropy with z-loss, from hidden states.

    Forward computes the gradients too, chunk by chunk, so the logits are computed once and none are kept; backward
    only scales the gradients. Formula: nll = log Z - logit[target], z = z_loss * (log Z)^2 (T5X `losses.py`), in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        z_loss: float,
        chunk: int,  # type: ignore[override]
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        """Compute the scaled loss and the statistics of T target tokens.

        hidden [T, d], weight [vocabulary / tensor, d], targets int64 [T] -> (scale * sum of nll + z-loss, fp32 [3, T]:
        nll, z-loss, correct). `group`: the tensor-parallel ranks, which divide the vocabulary.
        """
        shard = weight.shape[0]
        first = group.rank() * shard
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        several = targets.shape[0] > chunk
        grad_weight: Tensor | None = None
        if need_weight:  # written by a single chunk, or summed in fp32 over several
            new = torch.empty_like if 0 < targets.shape[0] <= chunk else torch.zeros_like
            grad_weight = new(weight, dtype=torch.float32 if several else weight.dtype)
        statistics = torch.empty(3, targets.shape[0], device=hidden.device)

        for start in range(0, targets.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = logits_fp32(hidden[part], weight)
            local = targets[part] - first
            here = (local >= 0) & (local < shard)
            local = local.clamp(0, shard - 1).unsqueeze(1)

            largest = logits.amax(1)
            target_logit = torch.where(here, logits.gather(1, local).squeeze(1), 0.0)
            _all_reduce(largest, dist.ReduceOp.MAX, group)
            probabilities = logits.sub_(largest.unsqueeze(1)).exp_()
            sums = torch.stack([probabilities.sum(1), target_logit])
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_z = sums[0].log() + largest
            torch.sub(log_z, sums[1], out=statistics[0, part])
            torch.mul(log_z.square(), z_loss, out=statistics[1, part])
            statistics[2, part] = sums[1] >= largest

            if need_hidden or need_weight:
                # d/dlogits = softmax * (1 + 2 z log Z) - onehot, in place of the probabilities
                factor = scale * (1 + 2 * z_loss * log_z)
                gradient = probabilities.mul_((factor / sums[0]).unsqueeze(1))
                gradient.scatter_add_(1, local, torch.where(here, -scale, 0.0).unsqueeze(1))
                gradient = gradient.to(weight.dtype)
                if grad_hidden is not None:
                    torch.mm(gradient, weight, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight = _accumulate(grad_weight, gradient, hidden[part], several)
        ctx.gradients = (grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(statistics)
        return scale * statistics[:2].sum(), statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients that forward has computed."""
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        # Scaled in place, on the device: a loop over one-element branches would wait for the GPU.
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad_loss),
            None if grad_weight is None else grad_weight.mul_(grad_loss),
            None,
            None,
            None,
            None,
            None,
        )


def logits_fp32(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute hidden @ weight^T in fp32, as T5X computes mT5's logits.

    hidden [T, d], weight [V, d] -> fp32 [T, V]. A GPU multiplies 16-bit operands exactly and sums in fp32. A CPU rounds
    the sums of 16-bit products to 16 bits (torch 2.13 has no other kernel there).
    """
    if hidden.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def next_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute what `logits_fp32` does, for the one position of each row that a search continues.

    A CPU's product of 2 to 8 rows of fp32 is faster with the matrix on the left: in a quarter of the time for 2 rows,
    57 % for 4, 71 % for 8 (mT5-small, torch 2.13, one thread; CPU time).
    """
    if hidden.dtype == torch.float32 and not hidden.is_cuda and 1 < len(hidden) <= FEW_ROWS:
        return (weight @ hidden.t()).t().contiguous()
    return logits_fp32(hidden, weight)


def totals_by_objective(statistics: Tensor, objectives: Tensor, num_objectives: int) -> Tensor:
    """Sum statistics [3, T] and counts by objective, int64 [T]: fp32 [4, num_objectives]."""
    values = torch.cat([statistics, torch.ones_like(statistics[:1])])
    return values.new_zeros(4, num_objectives).index_add_(1, objectives, values)


def _accumulate(total: Tensor, gradient: Tensor, hidden: Tensor, several: bool) -> Tensor:
    if not several:
        return torch.mm(gradient.t(), hidden, out=total)
    if not gradient.is_cuda or gradient.dtype == torch.float32:
        return total.addmm_(gradient.t().float(), hidden.float())
    for start in range(0, total.shape[0], ROWS_AT_ONCE):  # 16-bit operands use the matrix units, fp32 ones would not
        rows = slice(start, start + ROWS_AT_ONCE)
        total[rows] += torch.mm(gradient[:, rows].t(), hidden, out_dtype=torch.float32)
    return total


def _all_reduce(x: Tensor, op: Any, group: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(x, op, group=group)
