"""What a row may hold (packed examples, text alone, several images, no image at all), and what frozen parts keep."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from model.batch import ARRAYS, MicroBatch
from model.config import ModelConfig
from model.loss import LossTotals
from model.pali import PaLI, freeze
from tests.unit.model.examples import (
    MODEL,
    NUM_OBJECTIVES,
    TOKENS_PER_IMAGE,
    Example,
    example,
    gradients,
    largest_error,
    micro_batch,
    small_model,
)

TOLERANCE = 1e-5


def _run(pali: PaLI, batch: MicroBatch) -> tuple[Tensor, LossTotals, dict[str, Tensor]]:
    """Summed loss, totals and gradients of a micro-batch."""
    pali.zero_grad()
    loss, totals, _ = pali((), batch)
    loss.backward()
    return loss.detach(), LossTotals.from_tensor(totals), gradients(pali)


MIXED = [
    example(1),
    example(2, images=0, inputs=9),
    example(3, images=2),
    example(4, targets=11),
    example(5, inputs=0),
]


def test_packed_rows_equal_the_same_examples_unpacked() -> None:
    pali = small_model()
    a, b, c, d, e = MIXED
    loss, totals, expected = _run(pali, micro_batch([[x] for x in MIXED]))
    for rows in ([[a, b, c], [d, e]], [MIXED], [[e, d], [c], [b, a]]):
        packed_loss, packed_totals, packed = _run(
            pali, micro_batch(rows, encoder_length=60, decoder_length=40, image_slots=7)
        )
        torch.testing.assert_close(packed_loss, loss, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(packed_totals.nll, totals.nll, rtol=TOLERANCE, atol=0)
        assert torch.equal(packed_totals.tokens, totals.tokens)
        assert largest_error(packed, expected) < (TOLERANCE,)


def test_trimming_changes_nothing_that_counts() -> None:
    pali, (a, b, c, d, e) = small_model(), MIXED
    wide = micro_batch([[b], [a, c], [d, e], []], encoder_length=70, decoder_length=33, image_slots=9)
    wide.images = wide.images.roll(3, 0)  # unused slots in front, between and behind
    wide.visual_index = torch.where(wide.visual_index >= 0, wide.visual_index + 3 * TOKENS_PER_IMAGE, -1)
    loss, totals, expected = _run(pali, wide)
    for multiple, lengths in ((1, (58, 17)), (16, (64, 32)), (1000, (70, 33))):
        narrow = wide.trimmed(TOKENS_PER_IMAGE, multiple)
        assert (narrow.encoder_tokens.shape[1], narrow.decoder_tokens.shape[1]) == lengths
        assert len(narrow.images) == 5
        found_loss, found_totals, found = _run(pali, narrow)
        torch.testing.assert_close(found_loss, loss, rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(found_totals.nll, totals.nll, rtol=TOLERANCE, atol=0)
        assert largest_error(found, expected) < (TOLERANCE,)
    empty = micro_batch([[]], encoder_length=6, decoder_length=4, image_slots=3).trimmed(TOKENS_PER_IMAGE)
    assert (len(empty.images), *empty.encoder_tokens.shape) == (1, 1, 1)


def test_totals_add_up_by_objective() -> None:
    pali = small_model(model=ModelConfig(image_size=MODEL.image_size, z_loss=1e-2))
    _, totals, _ = _run(pali, micro_batch([MIXED]))
    assert totals.tokens.shape == (NUM_OBJECTIVES,)
    for objective in range(NUM_OBJECTIVES):
        members = [e for e in MIXED if e.objective == objective]
        _, alone, _ = _run(pali, micro_batch([[e] for e in members]))
        for name in ("nll", "z_loss", "correct", "tokens"):
            ours, theirs = getattr(totals, name), getattr(alone, name)
            torch.testing.assert_close(ours[objective], theirs.sum(), rtol=TOLERANCE, atol=1e-6)
        assert totals.tokens[objective] == sum(len(e.targets) + 1 for e in members)


def test_totals_by_example_come_out_of_the_same_pass() -> None:
    pali, rows = small_model(), [[MIXED[0], MIXED[1]], [], [MIXED[2], MIXED[3], MIXED[4]]]
    batch = micro_batch(rows)
    found = batch.totals_by_example(pali((), batch).statistics)
    assert found.shape == (4, 3, 3)
    for row, members in enumerate(rows):
        for place in range(3):
            if place >= len(members):
                assert not found[:, row, place].any()
                continue
            alone = _run(pali, micro_batch([[members[place]]]))[1]
            expected = torch.stack([x.sum() for x in (alone.nll, alone.z_loss, alone.correct, alone.tokens)])
            torch.testing.assert_close(found[:, row, place], expected, rtol=TOLERANCE, atol=1e-6)


def test_images_of_other_rows_do_not_matter() -> None:
    """A text-only example's loss is the same beside images, blank slots, or nothing."""
    pali = small_model()
    text = example(2, images=0)
    alone = _run(pali, micro_batch([[text]]))[1].nll[text.objective]
    for rows in ([[text], [example(3)]], [[example(3), text]]):
        totals = _run(pali, micro_batch(rows, image_slots=4))[1]
        torch.testing.assert_close(totals.nll[text.objective], alone, rtol=TOLERANCE, atol=0)


def test_order_of_several_images_matters() -> None:
    pali = small_model()
    one, other = Example([1, 2], [5, 6], [7]), Example([2, 1], [5, 6], [7])
    assert _run(pali, micro_batch([[one]]))[0] != _run(pali, micro_batch([[other]]))[0]


def test_batch_without_any_image_gives_every_parameter_a_gradient() -> None:
    """Ranks with and without images then run the same collectives."""
    _, _, found = _run(
        pali := small_model(), micro_batch([[example(1, images=0)], [example(2, images=0)]], image_slots=2)
    )
    assert found.keys() == _run(pali, micro_batch([[example(1)]]))[2].keys()
    assert all(torch.isfinite(g).all() for g in found.values())
    for name, gradient in found.items():
        if name.startswith(("patches", "vit_block", "bridge.vit_norm", "bridge.projection")):
            assert not gradient.any(), name


def test_empty_micro_batch_has_zero_loss_and_gradients() -> None:
    loss, totals, found = _run(small_model(), micro_batch([[], []], encoder_length=6, decoder_length=4, image_slots=1))
    assert loss == 0 and totals.tokens.sum() == 0 and totals.loss == 0
    assert not any(g.any() for g in found.values())


def test_an_emptied_micro_batch_has_the_shape_of_its_model_and_no_example() -> None:
    like = micro_batch([[example(1)], [example(2)]], image_slots=3)
    empty = like.emptied()
    assert all(getattr(empty, name).shape == getattr(like, name).shape for name in ARRAYS)
    assert (empty.visual_index == -1).all() and not empty.encoder_segments.any() and not empty.images.any()
    assert empty.num_targets == 0 and empty.num_positions == like.num_positions


def test_frozen_vit_keeps_nothing_for_a_backward_pass_and_stays_in_evaluation_mode() -> None:
    pali, batch = small_model(), micro_batch([[example(1)]])
    freeze(pali, ["patches.*", "vit_block_*", "bridge.vit_norm.*"])
    pali.train()
    saved: list[str] = []
    carry: tuple[Tensor, ...] = ()
    for name, unit in pali.units():
        with torch.autograd.graph.saved_tensors_hooks(lambda x, name=name: saved.append(name) or x, lambda x: x):
            carry = pali.run(unit, carry, batch)
        vision = name.startswith(("patches", "vit_block"))
        assert any(x.requires_grad for x in carry) != vision, name
        assert unit.training != vision, name
    assert "bridge" in saved and not [name for name in saved if name.startswith(("patches", "vit_block"))]
    carry[0].backward()
    trained = {name for name, p in pali.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in pali.named_parameters() if p.requires_grad}


def test_freezing_weights_alone_still_trains_their_biases() -> None:
    pali, batch = small_model(), micro_batch([[example(1)], [example(2)]])
    expected = _run(pali, batch)[2]
    freeze(pali, ["*_block_*_in.weight", "*_out.weight"])
    found = _run(pali, batch)[2]
    assert {name.rsplit(".", 1)[1] for name in found if "_in." in name} == {"bias"}
    assert largest_error(found, {name: expected[name] for name in found}) < (TOLERANCE,)


def test_frozen_language_model_passes_gradients_through() -> None:
    pali, batch = small_model(), micro_batch([[example(1)], [example(2)]])
    expected = _run(pali, batch)[2]
    freeze(pali, ["bridge.embedding.*", "bridge.*coder_bias.*", "encoder_*", "decoder_*", "head.*"])
    found = _run(pali, batch)[2]
    assert all(name.startswith(("patches", "vit_block", "bridge.vit_norm", "bridge.projection")) for name in found)
    assert largest_error(found, {name: expected[name] for name in found}) < (TOLERANCE,)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="vit_blocks_"):
        freeze(small_model(), ["vit_block_*", "vit_blocks_*"])


def test_recomputing_changes_no_gradient_and_keeps_less() -> None:
    batch = micro_batch([[example(1), example(2)], [example(3, images=2)]])
    expected = _run(pali := small_model(), batch)[2]

    def kept() -> int:
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: seen.setdefault(x.data_ptr(), x.nbytes) and x, lambda x: x
        ):
            pali((), batch)
        return sum(seen.values())

    everything = kept()
    for name, unit in pali.units():
        unit.recompute = "block" if "_block_" in name else "none"
    assert kept() < everything / 2
    assert largest_error(_run(pali, batch)[2], expected) < (TOLERANCE,)


def test_evaluation_takes_no_gradient_of_the_vocabulary() -> None:
    pali, batch = small_model(), micro_batch([[example(1)]])
    with torch.no_grad(), torch.profiler.profile(profile_memory=False, record_shapes=True) as profile:
        pali((), batch)
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    vocabulary = [shape for shape in shapes if any(104 in s for s in shape)]
    assert len(vocabulary) == 1, "the logits, and nothing else of the vocabulary's size"


def test_from_rows_takes_the_arrays_of_the_data_pipeline() -> None:
    batch = micro_batch([MIXED])
    rows = {
        name: getattr(batch, name).numpy().astype("uint8" if name == "images" else "int32")
        for name in (
            "images",
            "encoder_tokens",
            "encoder_segments",
            "visual_index",
            "decoder_tokens",
            "decoder_targets",
            "decoder_segments",
            "objectives",
        )
    }
    again = MicroBatch.from_rows(rows)
    assert again.encoder_tokens.dtype == torch.long and torch.equal(again.visual_index, batch.visual_index)
    assert again.num_targets == batch.num_targets == sum(len(e.targets) + 1 for e in MIXED)
