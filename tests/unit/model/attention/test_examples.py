"""Attention example by example, and rows joined into one, give what dense attention over the same rows gives."""

import pytest
import torch

from model.attention import examples as unpacking
from model.attention.examples import Examples, Unpacking
from model.attention.kernels import dense as dense_attention
from model.batch import MicroBatch
from model.loss import LossTotals
from tests.unit.model.examples import MT5, TOKENS_PER_IMAGE, example, gradients, largest_error, micro_batch, small_model

TOLERANCE = 1e-5
ALIKE = [example(i, inputs=4 + i % 3, targets=2 + i % 4) for i in range(1, 8)]
TEXT = example(8, images=0, inputs=18)


def packed() -> MicroBatch:
    """Seven images with text and one text alone in rows with padding, and a row without anything."""
    rows = [ALIKE[:3], [TEXT, *ALIKE[3:5]], [], ALIKE[5:]]
    return micro_batch(rows, encoder_length=80, decoder_length=24, image_slots=9)


def trained(batch: MicroBatch) -> tuple[torch.Tensor, LossTotals, dict[str, torch.Tensor]]:
    pali = small_model()
    loss, totals, _ = pali((), batch)
    loss.backward()
    return loss.detach(), LossTotals.from_tensor(totals), gradients(pali)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, LossTotals, dict[str, torch.Tensor]]:
    batch = packed()
    with monkeypatch.context() as patched:
        patched.setattr(Unpacking, "from_examples", lambda *_: None)
        return trained(batch)


@pytest.mark.parametrize("worth_a_class", [0, 2**16])
@pytest.mark.parametrize("multiple", [0, 1, 16])
def test_loss_and_gradients_are_those_of_dense_attention(
    multiple: int, worth_a_class: int, dense: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "WORTH_A_CLASS", worth_a_class)
    batch = packed()
    if multiple:
        batch = batch.trimmed(TOKENS_PER_IMAGE).joined(multiple)
    loss, totals, gradient = trained(batch)
    masks = (batch.encoder_mask, batch.decoder_mask, batch.cross_mask)
    assert [len(mask.unpacked) for mask in masks] == [1 if worth_a_class else 2] * 3
    torch.testing.assert_close(loss, dense[0], rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(totals.nll, dense[1].nll, rtol=TOLERANCE, atol=0)
    assert torch.equal(totals.tokens, dense[1].tokens)
    assert largest_error(gradient, dense[2]) < (TOLERANCE,)


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_joined_row_has_no_padding(multiple: int) -> None:
    batch = packed()
    positions, targets = (int((ids > 0).sum()) for ids in (batch.encoder_segments, batch.decoder_segments))
    joined = batch.joined(multiple)
    assert joined.encoder_tokens.shape == (1, -(-positions // multiple) * multiple)
    assert joined.decoder_tokens.shape == (1, -(-targets // multiple) * multiple)
    assert joined.num_targets == batch.num_targets
    assert joined.encoder_segments.unique_consecutive().tolist()[:8] == list(range(1, 9))


def test_rows_stay_where_joining_them_would_make_more_scores() -> None:
    for batch in (micro_batch([[each] for each in ALIKE]), packed().emptied()):
        assert batch.encoder_mask.unpacking is None
        assert batch.joined() is batch


def test_long_examples_are_a_class_of_their_own() -> None:
    """Of 21 examples one is three times as long as the others: alone it takes 256^2 scores, with them 22 times that."""
    segments = torch.zeros(8, 256, dtype=torch.long)
    segments[0, :250] = 1
    for row in range(1, 8):
        segments[row, :231] = 1 + torch.arange(231) // 77
    examples = Examples.from_segments(segments, segments)
    assert examples is not None
    found = Unpacking.from_examples(examples)
    assert [tuple(ids.shape) for ids in found.queries.segments] == [(1, 256), (21, 80)]
    assert examples.num_scores == 256 * 256 + 21 * 80 * 80
    x = torch.randn(256, 8, 3)
    assert found.keys is found.queries
    assert torch.equal(found.queries.repack(found.queries.unpack(x)), x * (segments.t() > 0).unsqueeze(-1))


def test_queries_and_keys_of_different_lengths() -> None:
    batch = packed()
    decoder, encoder = batch.decoder_segments, batch.encoder_segments
    examples = Examples.from_segments(decoder, encoder)
    assert examples is not None
    found = Unpacking.from_examples(examples)
    pairs = zip(found.queries.segments, found.keys.segments, strict=True)
    assert examples.num_scores == sum(q.numel() * k.shape[1] for q, k in pairs)
    for side, segments in ((found.queries, decoder), (found.keys, encoder)):
        x = torch.randn(*segments.t().shape, 3)
        assert torch.equal(side.repack(side.unpack(x)), x * (segments.t() > 0).unsqueeze(-1))


def test_examples_keep_their_losses_when_joined() -> None:
    pali, batch = small_model(), packed()
    joined = batch.joined()
    alone, together = (each.totals_by_example(pali((), each).statistics) for each in (batch, joined))
    assert together.shape[:2] == (4, 1)
    torch.testing.assert_close(together[:, 0], alone[:, alone[3] > 0], rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_examples_are_cut_into_classes_where_that_saves_most_scores(seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(1, 1500, (6,), generator=drawn) for _ in range(2))

    def scores(classes: list[torch.Tensor]) -> int:
        return sum(len(own) * int(queries[own].amax()) * int(keys[own].amax()) for own in classes)

    order = (queries * keys).argsort(descending=True, stable=True)
    whole = scores([order])
    best = min(scores([order[:cut], order[cut:]]) for cut in range(1, 6))
    found = unpacking._classes(queries, keys)
    assert sorted(torch.cat(found).tolist()) == list(range(6))
    assert scores(found) == (best if best <= whole - unpacking.WORTH_A_CLASS else whole)


@pytest.mark.parametrize(("rows", "separate"), [(0, False), (1, True), (3, True), (4, False)])
def test_examples_are_separate_where_that_saves_a_quarter_of_the_scores(rows: int, separate: bool) -> None:
    """Of four rows, each of 16 keys, the first ones have queries."""
    keys = torch.ones(4, 16, dtype=torch.long)
    queries = torch.zeros_like(keys)
    queries[:rows] = 1
    keys[max(rows, 1) :] = 0
    found = Examples.from_segments(queries, keys)
    assert (found is not None) is separate
    assert found is None or found.num_scores == rows * 16 * 16


def test_every_class_of_examples_has_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "WORTH_A_CLASS", 0)
    batch, block = packed(), small_model().encoder_block_0
    mask = batch.encoder_mask
    query, key, value = torch.randn(3, 80, len(batch.encoder_tokens), MT5.num_heads, MT5.d_kv)
    own = block.attention(query, key, value, None, mask)
    torch.testing.assert_close(
        own * (batch.encoder_segments.t() > 0)[..., None],
        dense_attention(query, key, value, None, mask.allowed) * (batch.encoder_segments.t() > 0)[..., None],
    )
    mask.unpacked.append(mask.unpacked[0])
    with pytest.raises(ValueError, match="longer than"):
        block.attention(query, key, value, None, mask)
