"""Greedy decoding, a batch at a time, with a key-value cache."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from model.layers import TensorParallel, whole_sequences
from model.mt5 import Bridge, Cache, DecoderBlock, Head
from model.pali import PaLI

PAD, EOS = 0, 1


@torch.no_grad()
def generate(model: PaLI, batch: MicroBatch, max_new_tokens: int, together: dist.ProcessGroup | None = None) -> Tensor:
    """The most probable next token, again and again: int64 [B, <= max_new_tokens], EOS included, then pad.

    One example per row of `batch` (segment 1 of the encoder); its decoder arrays are not read. `together`: ranks whose
    parameters are sharded over each other must take the same number of steps; they stop when all are done.
    The model is left in evaluation mode.
    """
    model.eval()
    units = dict(model.units())
    bridge, head = cast(Bridge, units["bridge"]), cast(Head, units["head"])
    decoder_blocks = [unit for unit in units.values() if isinstance(unit, DecoderBlock)]
    with whole_sequences(model, head.parallel):
        carry: tuple[Tensor, ...] = ()
        for unit in units.values():
            if isinstance(unit, DecoderBlock):
                break
            carry = unit(carry, batch)
        memory, decoder_bias = carry[0], carry[3]
        cross_mask = (batch.encoder_segments == 1)[:, None, None, :]
        caches = [_empty_cache(block, memory) for block in decoder_blocks]
        rows = batch.num_rows
        token = torch.full((rows, 1), PAD, device=memory.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=memory.device)
        generated: list[Tensor] = []
        for _ in range(max_new_tokens):
            x = bridge.embedding(token)
            for block, cache in zip(decoder_blocks, caches, strict=True):
                x = block.decode(x, decoder_bias, cache, cross_mask)
            (logits,) = head.output(head.norm(x)[0])
            token = _argmax(logits, head.parallel).masked_fill(ended, PAD).unsqueeze(1)
            generated.append(token)
            ended |= token.squeeze(1) == EOS
            if _all(ended, together):
                break
    return torch.cat(generated, dim=1)


def _empty_cache(block: DecoderBlock, memory: Tensor) -> Cache:
    key, value = block.memory(memory)
    return Cache(key.new_empty(0, *key.shape[1:]), key.new_empty(0, *key.shape[1:]), key, value)


def _argmax(logits: Tensor, parallel: TensorParallel) -> Tensor:
    """Of vocabulary-parallel logits [B, vocabulary / tensor]: the first rank with the largest value wins ties."""
    value, index = logits.max(dim=1)
    if parallel.size == 1:
        return index
    index = index + parallel.rank * logits.shape[1]
    values, indices = _gathered(value, parallel), _gathered(index, parallel)
    return indices.gather(0, values.argmax(0, keepdim=True)).squeeze(0)


def _gathered(x: Tensor, parallel: TensorParallel) -> Tensor:
    """[B] on every rank -> [tensor, B]."""
    ranks = x.new_empty(parallel.size * x.shape[0])
    dist.all_gather_into_tensor(ranks, x, group=parallel.group)
    return ranks.view(parallel.size, -1)


def _all(ended: Tensor, group: dist.ProcessGroup | None) -> bool:
    running = (~ended).any().int()
    if group is not None and group.size() > 1:
        dist.all_reduce(running, dist.ReduceOp.MAX, group=group)
    return not running.item()
