"""The loss against its formula, its independence of the chunk, and its peak of memory."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.loss import FEW_ROWS, VocabularyLoss, logits_fp32, next_logits, totals_by_objective
from model.tensor_parallel import PlannedGroup

GROUP = PlannedGroup()


def _case(tokens: int = 23, width: int = 16, vocabulary: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator, requires_grad=True)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,), generator=generator)


def _loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, z_loss: float, chunk: int
) -> tuple[Tensor, Tensor]:
    return VocabularyLoss.apply(hidden, weight, targets, scale, z_loss, chunk, GROUP)  # type: ignore[no-any-return]


def test_loss_statistics_and_gradients_against_the_formula() -> None:
    hidden, weight, targets = _case()
    logits = hidden.double() @ weight.double().t()
    log_z = logits.logsumexp(1)
    nll, z = F.cross_entropy(logits, targets, reduction="none"), 0.3 * log_z**2
    expected = torch.autograd.grad(0.7 * (nll + z).sum() * 2, (hidden, weight))

    loss, statistics = _loss(hidden, weight, targets, 0.7, 0.3, chunk=7)
    found = torch.autograd.grad(loss * 2, (hidden, weight))
    torch.testing.assert_close(loss, 0.7 * (nll + z).sum().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics[:2], torch.stack([nll, z]).detach().float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(statistics[2], (logits.argmax(1) == targets).float())
    for ours, theirs in zip(found, expected, strict=True):  # 16 to 101 terms a sum: 3e-7 is what fp32 leaves
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("chunk", [7, 1000])
def test_what_is_frozen_takes_no_gradient_from_what_is_not(chunk: int) -> None:
    """Gradients of the hidden states alone, below a frozen head, and of the head alone, are those of both."""
    hidden, weight, targets = _case()
    both = torch.autograd.grad(_loss(hidden, weight, targets, 0.7, 0.3, chunk)[0], (hidden, weight))
    below = torch.autograd.grad(_loss(hidden, weight.detach(), targets, 0.7, 0.3, chunk)[0], hidden)
    head = torch.autograd.grad(_loss(hidden.detach(), weight, targets, 0.7, 0.3, chunk)[0], weight)
    assert torch.equal(below[0], both[0]) and torch.equal(head[0], both[1])


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_search_are_those_of_the_loss(rows: int, dtype: torch.dtype) -> None:
    hidden, weight, _ = (x.detach() for x in _case(rows))
    found, expected = (logits(hidden.to(dtype), weight.to(dtype)) for logits in (next_logits, logits_fp32))
    assert found.shape == (rows, len(weight)) and found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = _case()
    loss, _ = _loss(hidden * 1000, weight, targets, 1.0, 1e-4, 8)
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("chunk", [1, 5, 22, 23, 24, 1000])
def test_nothing_depends_on_the_chunk(chunk: int) -> None:
    hidden, weight, targets = _case()
    loss, statistics = _loss(hidden, weight, targets, 1.0, 1e-4, 11)
    expected = torch.autograd.grad(loss, (hidden, weight))
    again, same_statistics = _loss(hidden, weight, targets, 1.0, 1e-4, chunk)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(same_statistics, statistics, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(again, (hidden, weight)), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_no_target_at_all() -> None:
    hidden, weight, targets = _case()
    loss, statistics = _loss(hidden[:0], weight, targets[:0], 1.0, 1e-4, 4)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert loss == 0 and not gradient.any() and statistics.shape == (3, 0)


class TwoRanks:
    """Two threads that hold half of the vocabulary each, and reduce through memory."""

    def __init__(self, rank: int, shared: list[Tensor], barrier: Barrier) -> None:
        self.own, self.shared, self.barrier = rank, shared, barrier

    def rank(self) -> int:
        return self.own

    def all_reduce(self, x: Tensor, op: object) -> None:
        self.shared[self.own] = x.clone()
        self.barrier.wait(20)
        both = torch.stack(self.shared)
        self.barrier.wait(20)
        x.copy_(both.amax(0) if op == dist.ReduceOp.MAX else both.sum(0))


def test_a_vocabulary_in_two_halves_has_the_loss_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = _case(vocabulary=102)
    targets[:6] = torch.tensor([0, 50, 51, 52, 100, 101])  # both ends of both halves
    loss, statistics = _loss(hidden, weight, targets, 0.7, 0.3, 7)
    expected = torch.autograd.grad(loss, (hidden, weight))
    monkeypatch.setattr("model.loss._all_reduce", lambda x, op, group: group.all_reduce(x, op))
    shared, barrier = [torch.empty(0)] * 2, Barrier(2)

    def half(rank: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        own = weight[rank * 51 : (rank + 1) * 51].detach().requires_grad_()
        x = hidden.detach().requires_grad_()
        found, totals = VocabularyLoss.apply(x, own, targets, 0.7, 0.3, 7, TwoRanks(rank, shared, barrier))  # type: ignore
        return found, totals, torch.autograd.grad(found, (x, own))

    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(half, range(2)))
    for found, totals, _ in halves:
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(totals, statistics)
    of_hidden, of_weight = zip(*(gradients for *_, gradients in halves), strict=True)
    torch.testing.assert_close(of_hidden[0] + of_hidden[1], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(of_weight), expected[1], rtol=1e-5, atol=1e-6)


def test_totals_by_objective() -> None:
    statistics = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [1.0, 0.0, 1.0]])
    totals = totals_by_objective(statistics, torch.tensor([2, 0, 2]), 4)
    torch.testing.assert_close(totals, torch.tensor([[2.0, 0, 4, 0], [0.2, 0, 0.4, 0], [0, 0, 2, 0], [1, 0, 2, 0]]))


PEAK = """
import re, torch
from pathlib import Path
from model.tensor_parallel import PlannedGroup
from model.loss import VocabularyLoss

weight, group = torch.randn(100_000, 8, requires_grad=True), PlannedGroup()

def peak_bytes(tokens, chunk):
    hidden, targets = torch.randn(tokens, 8, requires_grad=True), torch.randint(0, 100_000, (tokens,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    VocabularyLoss.apply(hidden, weight, targets, 1.0, 1e-4, chunk, group)[0].backward()
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak_bytes(128, 64)  # what the allocator keeps of a first loss, it keeps for all
print(peak_bytes(128, 64), peak_bytes(1024, 64), peak_bytes(1024, 1024))
"""


def test_peak_memory_does_not_follow_targets_times_vocabulary() -> None:
    """The peak of a process over three losses of 100,000 classes, forward and backward."""
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, or what is kept is counted
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK], env=returned, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    small, large, at_once = map(int, done.stdout.split())
    chunk_bytes = 64 * 100_000 * 4
    assert large < small + 2 * chunk_bytes, "eight times the targets, no more memory"
    assert at_once > small + 8 * chunk_bytes, "the measure sees logits that are taken at once"
