"""Pack examples into rows: several share an encoder row and a decoder row, kept apart by segment ids."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from data import objectives
from data.examples import EncodedExample, ExampleInfo, TextExample
from data.row_assignment import Ints, assign_rows
from data.tokenizer import PAD


@dataclass(frozen=True)
class RowShape:
    """The shape of every row: lengths in positions, images in slots of image_size x image_size pixels."""

    encoder_length: int
    decoder_length: int
    images_per_row: int
    image_size: int
    tokens_per_image: int


class Rows(TypedDict):
    """B rows of Le encoder and Ld decoder positions, with I = B * images_per_row image slots.

    images           uint8 [I, S, S, 3]  an unused slot is zeros; no channels beyond the first pipeline stage
    encoder_tokens   int32 [B, Le]       0 at visual positions and padding
    encoder_segments int32 [B, Le]       0 = padding, 1 … = example in the row, contiguous; visual tokens come first
    visual_index     int32 [B, Le]       slot * tokens_per_image + token, slot counted over all I; -1 where not visual
    decoder_tokens   int32 [B, Ld]       each segment shifted right: begins with pad
    decoder_targets  int32 [B, Ld]       each segment ends with EOS
    decoder_segments int32 [B, Ld]       0 = padding
    objectives       int32 [B, Ld]       index into data.objectives.NAMES, 0 where padding
    """

    images: NDArray[np.uint8]
    encoder_tokens: NDArray[np.int32]
    encoder_segments: NDArray[np.int32]
    visual_index: NDArray[np.int32]
    decoder_tokens: NDArray[np.int32]
    decoder_targets: NDArray[np.int32]
    decoder_segments: NDArray[np.int32]
    objectives: NDArray[np.int32]


def row_arrays(num_rows: int, shape: RowShape) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return the shape and type of each array of rows."""
    pixels = (num_rows * shape.images_per_row, shape.image_size, shape.image_size, 3)
    encoder = ("encoder_tokens", "encoder_segments", "visual_index")
    decoder = ("decoder_tokens", "decoder_targets", "decoder_segments", "objectives")
    lengths = dict.fromkeys(encoder, shape.encoder_length) | dict.fromkeys(decoder, shape.decoder_length)
    return {"images": (pixels, np.uint8)} | {name: ((num_rows, length), np.int32) for name, length in lengths.items()}


def empty_rows(num_rows: int, shape: RowShape, memory: Rows | None = None) -> Rows:
    """Return rows that hold no example: in `memory`, arrays of zeros, where it is given."""
    assert PAD == 0
    arrays = row_arrays(num_rows, shape)
    rows = memory or cast(Rows, {name: np.zeros(dimensions, kind) for name, (dimensions, kind) in arrays.items()})
    rows["visual_index"][:] = -1
    return rows


Text = TypeVar("Text", bound=TextExample)


def truncate(example: Text, shape: RowShape) -> Text:
    """Cut the texts of an example to the length of a row; a prompt's sentinel and EOS stay the last tokens."""
    text_length = shape.encoder_length - example.num_images * shape.tokens_per_image
    if len(example.encoder_ids) <= text_length and len(example.decoder_ids) <= shape.decoder_length:
        return example
    return replace(
        example,
        encoder_ids=_cut(example.encoder_ids, text_length, example.closing),
        decoder_ids=_cut(example.decoder_ids, shape.decoder_length),
        info=replace(example.info, truncated=True),
    )


def _cut(ids: NDArray[np.int32], length: int, closing: int = 1) -> NDArray[np.int32]:
    """Drop ids before the last `closing` ones until `length` ids are left."""
    return ids if len(ids) <= length else np.concatenate([ids[: length - closing], ids[-closing:]])


def size(example: TextExample, shape: RowShape) -> tuple[int, int, int]:
    """Return the encoder positions, decoder positions and image slots that an example takes."""
    visual = example.num_images * shape.tokens_per_image
    return visual + len(example.encoder_ids), len(example.decoder_ids), example.num_images


def place(examples: Sequence[TextExample], shape: RowShape, num_streams: int = 1) -> tuple[Ints, int]:
    """Return the row of each example of a pool, int64 [n], and the number of rows."""
    sizes = np.array([size(example, shape) for example in examples], np.int64).reshape(-1, 3)
    capacity = [shape.encoder_length, shape.decoder_length, max(1, shape.images_per_row)]  # of text alone, sizes are 0
    return assign_rows(sizes, np.array(capacity), num_streams)


def pack(examples: Sequence[EncodedExample], shape: RowShape) -> tuple[Rows, list[ExampleInfo]]:
    """Pack the examples into as few rows as hold them; infos are in their order, with row and segment set."""
    examples = [truncate(example, shape) for example in examples]
    return fill_rows(examples, *place(examples, shape), shape)


def fill_rows(
    examples: Iterable[EncodedExample | None], row_of: Ints, num_rows: int, shape: RowShape, rows: Rows | None = None
) -> tuple[Rows, list[ExampleInfo]]:
    """Write each example into its row, behind those before it; infos are in their order, with row and segment set.

    None is an example that could not be read. `rows`: at least `num_rows` empty rows to write to, else they are made.
    """
    rows = empty_rows(num_rows, shape) if rows is None else rows
    used = np.zeros((num_rows, 3), np.int64)
    segment = np.zeros(num_rows, np.int64)
    infos = []
    for example, row in zip(examples, row_of.tolist(), strict=True):
        if example is None:
            continue
        segment[row] += 1
        encoder_start, decoder_start, slot = used[row].tolist()
        used[row] += size(example, shape)
        encoder_end, decoder_end, _ = used[row].tolist()
        text_start = encoder_end - len(example.encoder_ids)
        slot += row * shape.images_per_row
        rows["images"][slot : slot + example.num_images] = example.images
        rows["visual_index"][row, encoder_start:text_start] = slot * shape.tokens_per_image + np.arange(
            text_start - encoder_start
        )
        rows["encoder_tokens"][row, text_start:encoder_end] = example.encoder_ids
        rows["encoder_segments"][row, encoder_start:encoder_end] = segment[row]
        rows["decoder_tokens"][row, decoder_start + 1 : decoder_end] = example.decoder_ids[:-1]
        rows["decoder_targets"][row, decoder_start:decoder_end] = example.decoder_ids
        rows["decoder_segments"][row, decoder_start:decoder_end] = segment[row]
        rows["objectives"][row, decoder_start:decoder_end] = objectives.NAMES.index(example.info.objective)
        infos.append(replace(example.info, row=row, segment=int(segment[row])))
    return rows, infos


def concatenate(parts: Sequence[Rows], shape: RowShape) -> Rows:
    """Concatenate the rows of `parts` (at least one)."""
    starts = np.cumsum([0, *(len(part["encoder_tokens"]) for part in parts)]).tolist()
    shifted = [_shift(part, start, shape) for part, start in zip(parts, starts, strict=False)]
    return _map(lambda *arrays: np.concatenate(arrays), *shifted)


def take(rows: Rows, start: int, stop: int, shape: RowShape) -> Rows:
    """Return rows start … stop-1, with image slots counted from the first of them."""
    part = _map(lambda array: array[start:stop], rows)
    part["images"] = rows["images"][start * shape.images_per_row : stop * shape.images_per_row]
    return _shift(part, -start, shape)


def micro_batches(rows: Rows, micro_batch_size: int, shape: RowShape) -> list[Rows]:
    """Cut rows into groups of exactly `micro_batch_size`, at least one; empty rows fill up the last group."""
    num_rows = len(rows["encoder_tokens"])
    padded = max(-(-num_rows // micro_batch_size), 1) * micro_batch_size
    if padded > num_rows:
        rows = concatenate([rows, empty_rows(padded - num_rows, shape)], shape)
    return [take(rows, start, start + micro_batch_size, shape) for start in range(0, padded, micro_batch_size)]


def _shift(rows: Rows, num_rows: int, shape: RowShape) -> Rows:
    """Count the image slots of the rows as if `num_rows` more lay before them."""
    index = rows["visual_index"]
    offset = np.int32(num_rows * shape.images_per_row * shape.tokens_per_image)
    return {**rows, "visual_index": np.where(index < 0, index, index + offset)}


def _map(function: Callable[..., NDArray[Any]], *rows: Rows) -> Rows:
    return cast(Rows, {name: function(*(part[name] for part in rows)) for name in Rows.__annotations__})  # type: ignore
