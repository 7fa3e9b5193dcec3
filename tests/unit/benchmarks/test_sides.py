"""Both sides of the benchmarks see the same examples, and Hugging Face's really trains."""

import math

import torch

from benchmarks.packing import row_examples
from benchmarks.sides import Example, Setting, hugging_face, one_per_row, padded
from model.batch import ARRAYS
from tests.unit.model.examples import MODEL, PALI, TOKENS_PER_IMAGE, example, image, micro_batch

ROWS = [[example(1), example(2, images=0)], [example(3, inputs=9, targets=1)], []]


def _examples() -> list[Example]:
    batch = micro_batch(ROWS, encoder_length=50, decoder_length=20)
    return row_examples({name: getattr(batch, name).numpy() for name in ARRAYS}, TOKENS_PER_IMAGE)  # type: ignore


def test_packed_rows_give_their_examples_back() -> None:
    expected = [e for row in ROWS for e in row]
    for found, e in zip(_examples(), expected, strict=True):
        assert (found.inputs, found.targets) == (e.inputs, [*e.targets, 1])
        assert (found.image is None) == (not e.images)
        assert found.image is None or torch.equal(found.image, image(e.images[0]))


def test_one_example_per_row_is_what_the_packer_makes_of_single_rows() -> None:
    ours, expected = one_per_row(_examples(), PALI), micro_batch([[e] for row in ROWS for e in row])
    for name in ("encoder_tokens", "encoder_segments", "decoder_tokens", "decoder_targets", "decoder_segments"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    assert torch.equal(ours.visual_index[0], expected.visual_index[0])


def test_packed_examples_are_what_the_packer_makes() -> None:
    ours, expected = one_per_row(_examples(), PALI, per_row=2), micro_batch(ROWS[:2])
    for name in ("encoder_tokens", "encoder_segments", "decoder_tokens", "decoder_targets", "decoder_segments"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    placed = [batch.visual_index >= 0 for batch in (ours, expected)]
    assert torch.equal(*placed)
    assert torch.equal(*(x.images[x.visual_index[x.visual_index >= 0] // TOKENS_PER_IMAGE] for x in (ours, expected)))


def test_hugging_face_learns_its_padded_batch() -> None:
    torch.manual_seed(0)
    batch, step = padded(_examples(), MODEL.image_size), hugging_face(Setting(PALI), "fp32")
    losses = [step([batch]) for _ in range(8)]
    assert batch["labels"].shape == (3, 5) and (batch["labels"] == -100).any()
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
