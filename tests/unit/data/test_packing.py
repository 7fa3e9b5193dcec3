"""Packed rows keep every token, apart from its neighbors, where the model expects it."""

from dataclasses import replace

import numpy as np
import pytest

from data.examples import EncodedExample, ExampleInfo
from data.objectives import NAMES
from data.packing import Rows, RowShape, concatenate, empty_rows, micro_batches, pack, take

SHAPE = RowShape(encoder_length=40, decoder_length=20, images_per_row=3, image_size=4, tokens_per_image=5)


def example(rng: np.random.Generator, num_images: int | None = None, text: int | None = None) -> EncodedExample:
    num_images = int(rng.integers(3)) if num_images is None else num_images
    encoder = np.append(rng.integers(3, 99, text or int(rng.integers(1, 20))), 1).astype(np.int32)
    decoder = np.append(rng.integers(3, 99, int(rng.integers(1, 12))), 1).astype(np.int32)
    images = rng.integers(1, 256, (num_images, 4, 4, 3)).astype(np.uint8)
    return EncodedExample(
        encoder, decoder, ExampleInfo("s", NAMES[int(rng.integers(8))], "k", "t", "en", "", ""), images
    )


@pytest.fixture(params=range(8))
def packed(request) -> tuple[list[EncodedExample], Rows, list[ExampleInfo]]:
    rng = np.random.default_rng(request.param)
    examples = [example(rng) for _ in range(request.param * 5)]
    return examples, *pack(examples, SHAPE)


def unpack(rows: Rows, info: ExampleInfo) -> dict[str, np.ndarray]:
    """What lies in an example's segment, images looked up through visual_index."""
    encoder = rows["encoder_segments"][info.row] == info.segment
    decoder = rows["decoder_segments"][info.row] == info.segment
    index = rows["visual_index"][info.row][encoder]
    slots = np.unique(index[index >= 0] // SHAPE.tokens_per_image)
    return {
        "positions": np.flatnonzero(encoder),
        "visual": index,
        "slots": slots,
        "images": rows["images"][slots],
        "encoder": rows["encoder_tokens"][info.row][encoder],
        "tokens": rows["decoder_tokens"][info.row][decoder],
        "targets": rows["decoder_targets"][info.row][decoder],
        "objectives": rows["objectives"][info.row][decoder],
    }


def test_every_example_is_found_whole_in_its_segment(packed):
    examples, rows, infos = packed
    for original, info in zip(examples, infos, strict=True):
        found = unpack(rows, info)
        num_visual = len(original.images) * SHAPE.tokens_per_image
        assert np.array_equal(np.diff(found["positions"]), np.ones(len(found["positions"]) - 1))
        assert np.array_equal(found["images"], original.images)
        first = found["slots"][0] * SHAPE.tokens_per_image if num_visual else 0
        assert np.array_equal(found["visual"][:num_visual], first + np.arange(num_visual))
        assert (found["visual"][num_visual:] == -1).all() and not found["encoder"][:num_visual].any()
        assert np.array_equal(found["encoder"][num_visual:], original.encoder_ids)
        assert np.array_equal(found["targets"], original.decoder_ids)
        assert np.array_equal(found["tokens"], [0, *original.decoder_ids[:-1]])
        assert (found["objectives"] == NAMES.index(info.objective)).all()


def test_nothing_else_is_in_the_rows(packed):
    examples, rows, infos = packed
    assert np.count_nonzero(rows["encoder_segments"]) == sum(len(e.encoder_ids) + 5 * len(e.images) for e in examples)
    assert np.count_nonzero(rows["decoder_targets"]) == sum(len(e.decoder_ids) for e in examples)
    assert rows["images"].any(axis=(1, 2, 3)).sum() == sum(len(e.images) for e in examples)
    assert np.count_nonzero(rows["visual_index"] >= 0) == sum(5 * len(e.images) for e in examples)
    for row in range(len(rows["encoder_tokens"])):
        segments = [info.segment for info in infos if info.row == row]
        assert segments == list(range(1, len(segments) + 1))
    shapes = {name: array.shape[1:] for name, array in rows.items()}
    assert shapes["images"] == (4, 4, 3) and shapes["encoder_tokens"] == (40,) and shapes["objectives"] == (20,)
    assert {array.dtype.name for name, array in rows.items() if name != "images"} == {"int32"}


def test_overlong_text_is_cut_but_keeps_eos_and_is_marked():
    rng = np.random.default_rng(0)
    long = example(rng, num_images=2, text=80)
    rows, (info,) = pack([long], SHAPE)
    found = unpack(rows, info)
    assert info.truncated and len(found["encoder"]) == 40
    assert np.array_equal(found["encoder"][10:], [*long.encoder_ids[:29], 1])
    assert not pack([example(rng, 1, 5)], SHAPE)[1][0].truncated


def test_a_prompt_that_is_cut_keeps_the_sentinel_that_asks():
    long = replace(example(np.random.default_rng(0), num_images=2, text=80), closing=2)
    rows, (info,) = pack([long], SHAPE)
    found = unpack(rows, info)
    assert np.array_equal(found["encoder"][10:], [*long.encoder_ids[:28], *long.encoder_ids[-2:]])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 7])
def test_micro_batches_hold_the_rows_and_count_images_for_themselves(packed, micro_batch_size):
    _, rows, _ = packed
    batches = micro_batches(rows, micro_batch_size, SHAPE)
    assert len(batches) == max(-(-len(rows["encoder_tokens"]) // micro_batch_size), 1)
    assert all(len(batch["encoder_tokens"]) == micro_batch_size for batch in batches)
    for batch in batches:
        assert (
            batch["images"].shape[0] == micro_batch_size * 3 and batch["visual_index"].max() < micro_batch_size * 3 * 5
        )
    again = take(concatenate(batches, SHAPE), 0, len(rows["encoder_tokens"]), SHAPE)
    assert all(np.array_equal(again[name], rows[name]) for name in Rows.__annotations__)


def test_no_example_at_all_is_one_empty_micro_batch():
    (batch,) = micro_batches(empty_rows(0, SHAPE), 2, SHAPE)
    assert batch["encoder_tokens"].shape == (2, 40) and not batch["encoder_segments"].any()
