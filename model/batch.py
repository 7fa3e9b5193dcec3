"""The input of one forward pass: a micro-batch of packed rows, and the attention masks that follow from it."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.masks import Mask

ARRAYS = (
    "images",
    "encoder_tokens",
    "encoder_segments",
    "visual_index",
    "decoder_tokens",
    "decoder_targets",
    "decoder_segments",
    "objectives",
)


@dataclass
class MicroBatch:
    """Packed rows; B rows, encoder length L, decoder length M, I image slots of S x S pixels.

    Several examples may share a row; segment ids (1, 2, ... contiguous; 0 is padding) keep them apart. A row of two
    examples, with 4 visual tokens per image; example 1 has the image of slot 2, example 2 has none:

        encoder_tokens     0  0  0  0 17 23 42  8  0        decoder_tokens     0 31 64  0 90  0
        visual_index       8  9 10 11 -1 -1 -1 -1 -1        decoder_targets   31 64  1 90  1  0
        encoder_segments   1  1  1  1  1  1  2  2  0        decoder_segments   1  1  1  2  2  0

    Where `visual_index` is >= 0, the bridge places that visual token instead of the embedding of a text token.
    """

    images: Tensor  # uint8 [I, S, S, 3]; unused slots are zeros; beyond the first pipeline stage [I, S, S, 0]
    encoder_tokens: Tensor  # int64 [B, L]; 0 at visual tokens and padding
    encoder_segments: Tensor  # int64 [B, L]
    visual_index: Tensor  # int64 [B, L]: image slot * tokens per image + token, -1 at text and padding
    decoder_tokens: Tensor  # int64 [B, M]: targets shifted right, each segment starts with 0
    decoder_targets: Tensor  # int64 [B, M]
    decoder_segments: Tensor  # int64 [B, M]
    objectives: Tensor  # int64 [B, M]: index of the objective a target token belongs to
    target_positions: Tensor | None = None  # int64 [T]: positions of the targets, in the flattened [M, B] order
    dropout_seed: int | None = None  # of `PaLI.forward`; None: masks come from torch's generator as it is

    def __post_init__(self) -> None:
        if self.target_positions is None:  # computed on the host: on a GPU, `nonzero` would wait for the device
            self.target_positions = (self.decoder_segments.t().reshape(-1) > 0).nonzero().squeeze(1)

    @classmethod
    def from_rows(cls, rows: Mapping[str, np.ndarray]) -> "MicroBatch":
        """Make a micro-batch of the arrays that the data pipeline packs (same names)."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(rows[name])) for name in ARRAYS}
        return cls(*(t if name == "images" else t.long() for name, t in tensors.items()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on `device`; a copy on the same device keeps the masks that are computed already.

        From the host to a GPU, the blocks of the masks go along: finding them there would take many kernels.
        """
        if self.encoder_segments.device == device:
            return copy(self)
        names = (*ARRAYS, "target_positions")
        moved = replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})
        if self.encoder_segments.device.type == "cpu":
            for name in ("encoder_mask", "decoder_mask", "cross_mask"):
                own: Mask = getattr(moved, name)
                setattr(moved, name, getattr(self, name).to_device(own.queries, own.keys))
        return moved

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of a copy on a GPU until a stream has used it, where another stream has copied."""
        tensors = [getattr(self, name) for name in (*ARRAYS, "target_positions")]
        tensors += [mask.host_blocks.packed for mask in (self.encoder_mask, self.decoder_mask, self.cross_mask)]
        for tensor in tensors:
            tensor.record_stream(stream)

    def seeded(self, seed: int) -> "MicroBatch":
        """Return a copy whose dropout is a function of `seed`; it keeps the masks that are computed already."""
        seeded = copy(self)
        seeded.dropout_seed = seed
        return seeded

    def pinned(self) -> "MicroBatch":
        """Return a copy in page-locked memory with the blocks of its masks, so that `to` a GPU only starts copies."""
        names = (*ARRAYS, "target_positions")
        locked = replace(self, **{name: getattr(self, name).pin_memory() for name in names})
        for mask in (locked.encoder_mask, locked.decoder_mask, locked.cross_mask):
            mask.host_blocks = mask.host_blocks.pinned()
        return locked

    def trimmed(self, tokens_per_image: int, multiple: int = 1, pin: bool = False) -> "MicroBatch":
        """Remove unused image slots (one stays), and positions behind the longest row.

        Lengths are rounded up to a `multiple`. `pin`: copy images to page-locked memory at once, so that `pinned` does
        not copy them again. For batches on the host: on a GPU, counting would wait for the device.
        """
        encoder, decoder = (_longest(x, multiple) for x in (self.encoder_segments, self.decoder_segments))
        index = self.visual_index[:, :encoder]
        slot, token = index.clamp(min=0) // tokens_per_image, index % tokens_per_image
        used = slot[index >= 0].unique()
        new_slot = torch.zeros(max(len(self.images), 1), dtype=torch.long)
        new_slot[used] = torch.arange(len(used))
        images = self.images[: max(len(used), 1)]  # no copy where all slots, or none, are used
        if 0 < len(used) < len(self.images):
            images = torch.index_select(self.images, 0, used, out=torch.empty_like(images, pin_memory=pin))
        return MicroBatch(
            images,
            self.encoder_tokens[:, :encoder],
            self.encoder_segments[:, :encoder],
            torch.where(index >= 0, new_slot[slot] * tokens_per_image + token, -1),
            self.decoder_tokens[:, :decoder],
            self.decoder_targets[:, :decoder],
            self.decoder_segments[:, :decoder],
            self.objectives[:, :decoder],
        )

    def joined(self, multiple: int = 1) -> "MicroBatch":
        """Concatenate all rows into one without padding, its lengths rounded up to a `multiple`.

        Segments are numbered on, from 1:

            row 1   1 1 1 2 2 0 0
            row 2   1 1 0 0 0 0 0     ->    1 1 1 2 2 3 3 4 4 5 5 5
            row 3   1 1 2 2 2 0 0

        Returns the micro-batch itself if that would add over a quarter to the attention scores: they would cost more
        than the padding that it removes. For batches on the host that go to a CPU.
        """
        in_row = torch.maximum(self.encoder_segments.amax(1), self.decoder_segments.amax(1))
        first = (in_row.cumsum(0) - in_row).unsqueeze(1)
        encoder, decoder = self.encoder_segments > 0, self.decoder_segments > 0
        if not (encoder.any() and decoder.any()):
            return self
        one = MicroBatch(
            self.images,
            self.encoder_tokens[encoder][None],
            (self.encoder_segments + first)[encoder][None],
            self.visual_index[encoder][None],
            self.decoder_tokens[decoder][None],
            self.decoder_targets[decoder][None],
            (self.decoder_segments + first)[decoder][None],
            self.objectives[decoder][None],
        ).padded(multiple)
        return one if one.num_scores <= 1.25 * self.num_scores else self

    def padded(self, multiple: int) -> "MicroBatch":
        """Round both lengths up to a multiple, by positions that belong to no example."""
        encoder, decoder = (-x.shape[1] % multiple for x in (self.encoder_segments, self.decoder_segments))
        if not (encoder or decoder):
            return self
        return replace(
            self,
            encoder_tokens=F.pad(self.encoder_tokens, (0, encoder)),
            encoder_segments=F.pad(self.encoder_segments, (0, encoder)),
            visual_index=F.pad(self.visual_index, (0, encoder), value=-1),
            decoder_tokens=F.pad(self.decoder_tokens, (0, decoder)),
            decoder_targets=F.pad(self.decoder_targets, (0, decoder)),
            decoder_segments=F.pad(self.decoder_segments, (0, decoder)),
            objectives=F.pad(self.objectives, (0, decoder)),
        )

    def emptied(self) -> "MicroBatch":
        """Return a micro-batch of as many rows and image slots, without an example."""
        zeros = {name: torch.zeros_like(getattr(self, name)) for name in ARRAYS}
        return MicroBatch(**zeros | {"visual_index": zeros["visual_index"] - 1})  # type: ignore[arg-type]

    def blanked(self) -> "MicroBatch":
        """Return the same rows with every image mid-gray, the input of a blind model."""
        return replace(self, images=torch.full_like(self.images, 127))

    @property
    def num_rows(self) -> int:
        """B."""
        return self.encoder_tokens.shape[0]

    @property
    def num_positions(self) -> int:
        """Encoder and decoder positions, padding included."""
        return self.encoder_segments.numel() + self.decoder_segments.numel()

    @property
    def num_targets(self) -> int:
        """T, the target tokens of this micro-batch."""
        assert self.target_positions is not None
        return self.target_positions.numel()

    @property
    def num_examples(self) -> int:
        """Packed examples; for batches on the host, as counting would wait for a GPU."""
        return int(self.decoder_segments.amax(1).sum())

    @property
    def num_scores(self) -> int:
        """Attention scores that one head of an encoder and a decoder block computes on a CPU."""
        return sum(mask.num_scores for mask in (self.encoder_mask, self.decoder_mask, self.cross_mask))

    def totals_by_example(self, statistics: Tensor) -> Tensor:
        """Sum the head's statistics [3, T] by packed example: fp32 [4, B, most examples in a row].

        The four are nll, z-loss (nats), correct and targets. Segment s of a row is at s - 1 (of joined rows: the
        examples of all rows, in their order).
        """
        assert self.target_positions is not None
        rows, most = self.num_rows, int(self.decoder_segments.amax())
        segments = self.decoder_segments.t().reshape(-1)[self.target_positions]
        example = self.target_positions % rows * most + segments - 1
        values = torch.cat([statistics, torch.ones_like(statistics[:1])])
        return values.new_zeros(4, rows * most).index_add_(1, example, values).view(4, rows, most)

    @cached_property
    def encoder_mask(self) -> Mask:
        """Self-attention of the encoder, within a segment."""
        return Mask(self.encoder_segments, self.encoder_segments)

    @cached_property
    def decoder_mask(self) -> Mask:
        """Self-attention of the decoder: the past of the same segment."""
        return Mask(self.decoder_segments, self.decoder_segments, causal=True)

    @cached_property
    def cross_mask(self) -> Mask:
        """Cross-attention: a decoder segment attends to the encoder segment of the same number."""
        return Mask(self.decoder_segments, self.encoder_segments)


def _longest(segments: Tensor, multiple: int) -> int:
    """Count positions up to the last that any row of segment ids [B, S] uses, rounded up, at most S."""
    used = (segments > 0).any(0).nonzero()
    length = int(used.amax()) + 1 if len(used) else 1
    return min(-(-length // multiple) * multiple, segments.shape[1])
