"""Greedy decoding, a batch at a time, with a key-value cache."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from model.layers import TensorParallel, whole_sequences
from model.mt5 import Bridge, Cache, Carry, DecoderBlock, Head
from model.pali import PaLI

PAD, EOS = 0, 1


class Decoder:
    """The units of a model in the order of greedy search: the encoder once, then the decoder token by token."""

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
        self.caches = {name: _empty_cache(block, carry.encoder) for name, block in self.blocks.items()}

    def next(self, token: Tensor) -> Tensor:
        """Return the most probable token after `token` [B, 1] and those before it: int64 [B]."""
        return self.predict(self.decode(self.embed(token), list(self.blocks)))

    def embed(self, token: Tensor) -> Tensor:
        """int64 [B, 1] -> [1, B, d]."""
        return cast(Bridge, self.units["bridge"]).embedding(token)

    def decode(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Run these decoder blocks: [1, B, d] -> [1, B, d]."""
        for name in names:
            x = self.blocks[name].decode(x, self.decoder_bias, self.caches[name], self.cross_mask)
        return x

    def predict(self, x: Tensor) -> Tensor:
        """Return the most probable tokens: [1, B, d] -> int64 [B]."""
        head = cast(Head, self.units["head"])
        (logits,) = head.output(head.norm(x)[0])
        return _argmax(logits, head.parallel)


@torch.no_grad()
def generate(
    model: PaLI,
    batch: MicroBatch,
    max_new_tokens: int,
    together: dist.ProcessGroup | None = None,
    decoder: Decoder | None = None,
) -> Tensor:
    """Generate the most probable next token repeatedly: int64 [B, <= max_new_tokens], EOS included, then pad.

    One example per row of `batch` (segment 1 of the encoder); its decoder arrays are not read. `together`: ranks whose
    parameters are sharded over each other; they take the same number of steps and stop when all are done. `decoder`:
    the one of a pipeline, if this rank has only some units. The model is left in evaluation mode.
    """
    model.eval()
    decoder = decoder or Decoder(model, batch)
    with whole_sequences(model):
        decoder.start()
        token = torch.full((batch.num_rows, 1), PAD, device=batch.encoder_tokens.device)
        ended = torch.zeros(batch.num_rows, dtype=torch.bool, device=token.device)
        generated: list[Tensor] = []
        for _ in range(max_new_tokens):
            token = decoder.next(token).masked_fill(ended, PAD).unsqueeze(1)
            generated.append(token)
            ended |= token.squeeze(1) == EOS
            if _all(ended, together):
                break
    return torch.cat(generated, dim=1)


def _empty_cache(block: DecoderBlock, memory: Tensor) -> Cache:
    key, value = block.memory(memory)
    return Cache(key.new_empty(0, *key.shape[1:]), key.new_empty(0, *key.shape[1:]), key, value)


def _argmax(logits: Tensor, parallel: TensorParallel) -> Tensor:
    """Return the largest index of vocabulary-parallel logits [B, vocabulary / tensor]; the lowest rank wins ties."""
    value, index = logits.max(dim=1)
    if parallel.size == 1:
        return index
    index = index + parallel.rank * logits.shape[1]
    values, indices = _gathered(value, parallel), _gathered(index, parallel)
    return indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0)


def _gathered(x: Tensor, parallel: TensorParallel) -> Tensor:
    """Gather [B] of every rank: [tensor, B]."""
    ranks = x.new_empty(parallel.size * x.shape[0])
    dist.all_gather_into_tensor(ranks, x, group=parallel.group)
    return ranks.view(parallel.size, -1)


def _all(ended: Tensor, group: dist.ProcessGroup | None) -> bool:
    running = (~ended).any().int()
    if group is not None and group.size() > 1:
        dist.all_reduce(running, dist.ReduceOp.MAX, group=group)
    return not running.item()
