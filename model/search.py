"""Choose tokens from logits that tensor-parallel ranks divide by vocabulary, and search with beams."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigurationError
from common.values import one_of
from model.tensor_parallel import TensorParallel

PAD, EOS = 0, 1
NEVER = -1e9  # score of a hypothesis that does not exist


@dataclass(frozen=True)
class Search:
    """Choose how to generate; the default is greedy. Raises ConfigurationError for impossible values."""

    num_beams: int = 1
    """Hypotheses of a row that are followed at once. 1 by default: no beam search."""
    length_penalty: float = 0.6
    """Exponent alpha of the length that a finished hypothesis's log-probability is divided by. 0.6 is T5X's default
    (`decoding.py::beam_search`)."""
    length_norm: str = "t5"
    """`t5`: ((5 + length) / 6) ^ alpha, and the search ends when no hypothesis can become better, as in T5X.
    `hugging_face`: length ^ alpha, and it ends as transformers' `generate` does with `early_stopping=False`."""
    temperature: float = 0.0
    """Divide logits by this and draw from their softmax. 0 by default: take the most probable token."""
    top_p: float = 1.0
    """Draw from the most probable tokens whose probabilities add up to this. 1 by default: from all."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        one_of("length_norm", self.length_norm, ("t5", "hugging_face"))
        if self.num_beams < 1:
            raise ConfigurationError(f"num_beams={self.num_beams} must be at least 1.")
        if self.temperature < 0:
            raise ConfigurationError(f"temperature={self.temperature} must not be negative; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p} must lie in (0, 1].")
        if self.num_beams > 1 and self.temperature:
            raise ConfigurationError(f"num_beams={self.num_beams} draws nothing; set temperature=0, or num_beams=1.")
        if self.top_p < 1 and not self.temperature:
            raise ConfigurationError(f"top_p={self.top_p} needs draws; set a temperature, such as 1.")


class Choice(ABC):
    """Choose from logits fp32 [R, vocabulary / tensor] of R hypotheses; all tensor-parallel ranks get the same."""

    @abstractmethod
    def __call__(self, logits: Tensor, parallel: TensorParallel) -> tuple[Tensor, ...]:
        """Return the choice, one tensor [R] or [R, k] of each kind. A collective of the tensor-parallel group."""

    @abstractmethod
    def empty(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """Return tensors of the choice's shapes, for ranks that receive it."""


class Greedy(Choice):
    """The most probable token, int64 [R]; the lowest index wins ties."""

    def __call__(self, logits: Tensor, parallel: TensorParallel) -> tuple[Tensor, ...]:
        """See Choice."""
        value, index = logits.max(dim=1)
        if parallel.size == 1:
            return (index,)
        values = gathered(value, parallel)
        indices = gathered(index + parallel.rank * logits.shape[1], parallel)
        return (indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0),)

    def empty(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """See Choice."""
        return (torch.empty(rows, dtype=torch.long, device=device),)


class Sampled(Greedy):
    """A token drawn from the nucleus of the softmax (Holtzman et al., 2020), int64 [R]."""

    def __init__(self, search: Search, device: torch.device) -> None:
        self.search, self.generator = search, torch.Generator(device).manual_seed(search.seed)

    def __call__(self, logits: Tensor, parallel: TensorParallel) -> tuple[Tensor, ...]:
        """See Choice."""
        if parallel.size > 1:
            logits = gathered(logits, parallel).transpose(0, 1).flatten(1)
        probabilities, order = (logits / self.search.temperature).softmax(1).sort(dim=1, descending=True, stable=True)
        before = probabilities.cumsum(1) - probabilities
        kept = probabilities.masked_fill(before >= self.search.top_p, 0.0)
        drawn = torch.multinomial(kept, 1, generator=self.generator)
        return (order.gather(1, drawn).squeeze(1),)


@dataclass(frozen=True)
class Best(Choice):
    """The `count` most probable tokens: log-probabilities (nats) fp32 [R, count], and tokens int64 [R, count]."""

    count: int

    def __call__(self, logits: Tensor, parallel: TensorParallel) -> tuple[Tensor, ...]:
        """See Choice."""
        values, tokens = logits.topk(self.count, dim=1)
        total = logits.logsumexp(1)
        if parallel.size > 1:
            total = gathered(total, parallel).logsumexp(0)
            tokens = gathered(tokens + parallel.rank * logits.shape[1], parallel).transpose(0, 1).flatten(1)
            values = gathered(values, parallel).transpose(0, 1).flatten(1)
            values, best = values.topk(self.count, dim=1)
            tokens = tokens.gather(1, best)
        return values - total.unsqueeze(1), tokens

    def empty(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """See Choice."""
        shape = (rows, self.count)
        return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.long, device=device)


def choice_for(search: Search, device: torch.device) -> Choice:
    """Return the choice of one token per row."""
    return Sampled(search, device) if search.temperature else Greedy()


class Beams:
    """The hypotheses of a beam search over B rows with K beams each: K running, and the best K finished.

    One search serves T5X and transformers, because the second is made after the first: a step takes the best 2 K
    continuations of a row: those that end are finished, and the best K others run on.
    """

    def __init__(self, num_rows: int, max_new_tokens: int, search: Search, device: torch.device) -> None:
        self.search, self.most, self.length, self.width = search, max_new_tokens, 0, search.num_beams
        self.choice = Best(2 * self.width)
        self.first_row = torch.arange(num_rows, device=device).unsqueeze(1)
        self.running = torch.full((num_rows, 1, max_new_tokens), PAD, device=device)  # one hypothesis: the empty one
        self.scores = torch.zeros(num_rows, 1, device=device)
        self.finished = torch.full((num_rows, self.width, max_new_tokens), PAD, device=device)
        self.finished_scores = torch.full((num_rows, self.width), NEVER, device=device)
        self.is_open = torch.ones(num_rows, 1, dtype=torch.bool, device=device)  # whether a row may become better

    @property
    def last(self) -> Tensor:
        """The last token of every running hypothesis, int64 [B * N, 1]."""
        if self.length == 0:
            return self.running[:, :, :1].flatten(0, 1)
        return self.running[:, :, self.length - 1].reshape(-1, 1)

    def extend(self, log_probabilities: Tensor, tokens: Tensor) -> Tensor:
        """Take the best continuations, [B * N, 2 K] each; return the hypotheses that run on, int64 [B * K]."""
        rows, before = self.scores.shape
        totals = (self.scores.unsqueeze(2) + log_probabilities.view(rows, before, -1)).flatten(1)
        totals, best = totals.topk(2 * self.width, dim=1)
        parents = best // tokens.shape[1]
        tokens = tokens.view(rows, -1).gather(1, best)
        continued = self._gather(self.running, parents)
        continued[:, :, self.length] = tokens
        self.length += 1
        ends = tokens == EOS
        at_end = self.length == self.most
        self._finish(continued, totals, ends if self._as_t5 else ends | at_end)
        self.scores, kept = totals.masked_fill(ends, NEVER).topk(self.width, dim=1)
        self.running = self._gather(continued, kept)
        self._close()
        return (self.first_row * before + parents.gather(1, kept)).flatten()

    def best(self) -> Tensor:
        """Return the best hypothesis of each row: int64 [B, longest], EOS included, then pad."""
        found = self.finished_scores[:, :1] > NEVER / 2
        best = torch.where(found, self.finished[:, 0], self.running[:, 0])
        return _trimmed(best)

    @property
    def _as_t5(self) -> bool:
        return self.search.length_norm == "t5"

    def _norm(self, length: int) -> float:
        base = (5 + length) / 6 if self._as_t5 else length
        return float(base**self.search.length_penalty)

    def _finish(self, continued: Tensor, totals: Tensor, ends: Tensor) -> None:
        """Merge the continuations that end into the best K finished ones."""
        if not self._as_t5:  # transformers lets only the best K of the 2 K end
            ends = ends & (torch.arange(ends.shape[1], device=ends.device) < self.width)
        scores = (totals / self._norm(self.length)).masked_fill(~(ends & self.is_open), NEVER)
        merged = torch.cat([self.finished_scores, scores], dim=1)
        self.finished_scores, kept = merged.topk(self.width, dim=1)
        self.finished = self._gather(torch.cat([self.finished, continued], dim=1), kept)

    def _close(self) -> None:
        """Close rows whose best running hypothesis cannot become better than the worst of K finished ones."""
        grows = self._as_t5 and self.search.length_penalty > 0
        possible = self.scores[:, :1] / self._norm(self.most if grows else self.length)
        self.is_open &= possible > self.finished_scores[:, -1:]

    @staticmethod
    def _gather(sequences: Tensor, index: Tensor) -> Tensor:
        return sequences.gather(1, index.unsqueeze(2).expand(-1, -1, sequences.shape[2]))


def _trimmed(tokens: Tensor) -> Tensor:
    """Drop the positions behind the longest row; one stays."""
    used = (tokens != PAD).any(0).nonzero()
    return tokens[:, : int(used.amax()) + 1] if len(used) else tokens[:, :1]


def gathered(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Gather [R, ...] of every tensor-parallel rank: [tensor, R, ...]."""
    ranks = x.new_empty(parallel.size, *x.shape)
    dist.all_gather_into_tensor(ranks.flatten(0, 1), x.contiguous(), group=parallel.group)
    return ranks
