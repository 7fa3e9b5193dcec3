"""Generate text with a key-value cache: greedily, by beams, or by sampling; and score given texts.

The encoder runs once for a batch. `Search` holds the choices, `model.search` the searches.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigurationError
from model.batch import MicroBatch
from model.cache import Cache
from model.mt5 import Bridge, Carry, DecoderBlock, Head
from model.pali import PaLI
from model.search import EOS, PAD, Beams, Choice, Search, choice_for
from model.tensor_parallel import whole_sequences

SCORED_AT_ONCE = 2**12  # decoder positions; their caches exist at once


class Decoder:
    """The units of a model in the order of generation: the encoder once, then the decoder, some tokens at a time."""

    def __init__(self, model: PaLI, batch: MicroBatch) -> None:
        self.model, self.batch, self.units = model, batch, dict(model.units())
        self.blocks = {name: unit for name, unit in self.units.items() if isinstance(unit, DecoderBlock)}
        self.caches: dict[str, Cache] = {}

    def start(self) -> None:
        """Encode the batch, and compute every decoder block's keys and values of it."""
        carry: tuple[Tensor, ...] = ()
        for name, unit in self.units.items():
            if name in self.blocks:
                break
            carry = unit(carry, self.batch)
        self.fill_caches(Carry(*carry))

    def fill_caches(self, carry: Carry) -> None:
        """Start the caches of the decoder blocks from the carry after the encoder."""
        self.decoder_bias = carry.decoder_bias
        self.cross_mask = (self.batch.encoder_segments == 1)[:, None, None, :]
        self.caches = {name: block.start_cache(carry.encoder) for name, block in self.blocks.items()}

    def next(self, tokens: Tensor, choice: Choice) -> tuple[Tensor, ...]:
        """Return the choice after `tokens` [B * N, 1] and those before them, which the caches hold."""
        empty = choice.empty(len(tokens), tokens.device)
        return self.at_head(lambda x: self.choose(x, choice), self.hidden(tokens), empty)

    def score(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return fp32 [B * N, M], the log-probability (nats) of each target after the tokens up to its position.

        `tokens` and `targets` int64 [B * N, M]: decoder inputs, and what follows them. Forgets what was generated.
        """
        self.clear()
        empty = torch.empty(targets.shape, device=targets.device)
        return self.at_head(lambda x: (self.log_probabilities(x, targets),), self.hidden(tokens), (empty,))[0]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Run the decoder on new tokens: int64 [B * N, M] -> [M, B * N, d]."""
        return self.decode(self.embed(tokens), list(self.blocks))

    def at_head(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, empty: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return `compute(x)`, which needs the head; `empty` has the shapes of the result."""
        return compute(x)

    def select(self, hypotheses: Tensor) -> None:
        """Continue with these of the B * N hypotheses."""
        for cache in self.caches.values():
            cache.select(hypotheses)

    def clear(self) -> None:
        """Forget all generated tokens."""
        for cache in self.caches.values():
            cache.clear()

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B * N, M] -> [M, B * N, d]."""
        return cast(Bridge, self.units["bridge"]).embedding(tokens)

    def decode(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Run these decoder blocks: [M, B * N, d] -> [M, B * N, d]."""
        bias: Tensor | None = None
        for name in names:
            block, cache = self.blocks[name], self.caches[name]
            if bias is None or block.relative_bias is not None:  # else one look-up serves all blocks
                bias = block.decoding_bias(self.decoder_bias, cache.length, x)
            x = block.decode(x, bias, cache, self.cross_mask)
        return x

    def choose(self, x: Tensor, choice: Choice) -> tuple[Tensor, ...]:
        """Choose from the logits of the one position of x [1, B * N, d]."""
        head = cast(Head, self.units["head"])
        (logits,) = head.output(head.norm(x)[0])
        return choice(logits, head.parallel)

    def log_probabilities(self, x: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [M, B * N, d] and targets int64 [B * N, M] -> fp32 [B * N, M]; logits exist in chunks."""
        head = cast(Head, self.units["head"])
        _, statistics = head.output(head.norm(x).flatten(0, 1), targets.t().flatten(), 1.0)
        return -statistics[0].view(targets.shape[1], -1).t()


@torch.no_grad()
def generate(
    model: PaLI,
    batch: MicroBatch,
    max_new_tokens: int,
    together: dist.ProcessGroup | None = None,
    decoder: Decoder | None = None,
    **search: Any,
) -> Tensor:
    """Generate a text for each row: int64 [B, <= max_new_tokens], EOS included, then pad.

    One example per row of `batch` (segment 1 of the encoder); its decoder arrays are not read. `search`: fields of
    `Search`, greedy by default. `together`: ranks whose parameters are sharded over each other; they take the same
    number of steps and stop when all are done. `decoder`: the one of a pipeline, if this rank has only some units. The
    model is left in evaluation mode. Raises ConfigurationError as `Search`, and for less than one new token.
    """
    settings, device = Search(**search), batch.encoder_tokens.device
    if max_new_tokens < 1:
        raise ConfigurationError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    model.eval()
    decoder = decoder or Decoder(model, batch)
    with whole_sequences(model):
        decoder.start()
        if settings.num_beams > 1:
            return _by_beams(decoder, Beams(batch.num_rows, max_new_tokens, settings, device), together)
        choice = choice_for(settings, device)
        token = torch.full((batch.num_rows, 1), PAD, device=device)
        ended = torch.zeros(batch.num_rows, dtype=torch.bool, device=token.device)
        generated: list[Tensor] = []
        for _ in range(max_new_tokens):
            (chosen,) = decoder.next(token, choice)
            token = chosen.masked_fill(ended, PAD).unsqueeze(1)
            generated.append(token)
            ended |= token.squeeze(1) == EOS
            if _all(ended, together):
                break
    return torch.cat(generated, dim=1)


def _by_beams(decoder: Decoder, beams: Beams, together: dist.ProcessGroup | None) -> Tensor:
    for _ in range(beams.most):
        decoder.select(beams.extend(*decoder.next(beams.last, beams.choice)))
        if _all(~beams.is_open, together):
            break
    return beams.best()


@torch.no_grad()
def score(
    model: PaLI, batch: MicroBatch, targets: Sequence[Sequence[Sequence[int]]], decoder: Decoder | None = None
) -> Tensor:
    """Return the log-probability (nats) of each target text: fp32 [B, N]; all texts of a row share its encoder pass.

    `targets`: N lists of ids for each of the B rows, each with EOS at its end. `decoder`: as for `generate`. The model
    is left in evaluation mode.
    """
    model.eval()
    decoder = decoder or Decoder(model, batch)
    device = batch.encoder_tokens.device
    lengths = torch.tensor([[len(text) for text in row] for row in targets])  # [B, N]
    order = lengths.amax(0).argsort().tolist()  # texts of similar lengths together -> little padding
    scores = torch.empty(lengths.shape, device=device)
    with whole_sequences(model):
        decoder.start()
        while order:
            columns: list[int] = []
            while order and (not columns or _fits(lengths[:, [*columns, order[0]]])):
                columns.append(order.pop(0))
            found = nn.utils.rnn.pad_sequence(
                [torch.tensor(row[column]) for row in targets for column in columns], batch_first=True, padding_value=-1
            ).to(device)
            shifted = F.pad(found[:, :-1].clamp(min=PAD), (1, 0), value=PAD)
            each = decoder.score(shifted, found.clamp(min=PAD))
            scores[:, columns] = each.masked_fill(found < 0, 0.0).sum(1).view(len(targets), -1)
    return scores


def _fits(lengths: Tensor) -> bool:
    return lengths.numel() * int(lengths.amax()) <= SCORED_AT_ONCE


def _all(ended: Tensor, group: dist.ProcessGroup | None) -> bool:
    running = (~ended).any().int()
    if group is not None and group.size() > 1:
        dist.all_reduce(running, dist.ReduceOp.MAX, group=group)
    return not running.item()
