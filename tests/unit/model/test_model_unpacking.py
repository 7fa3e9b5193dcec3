"""Attention example by example, and rows joined into one, give what dense attention over the same rows gives."""

import pytest
import torch

from model.batch import MicroBatch
from model.loss import LossTotals
from model.unpacking import Unpacking
from tests.unit.model.examples import TOKENS_PER_IMAGE, example, gradients, largest_error, micro_batch, small_model

TOLERANCE = 1e-5
ALIKE = [example(i, inputs=4 + i % 3, targets=2 + i % 4) for i in range(1, 8)]
TEXT = example(8, pictures=0, inputs=18)


def packed() -> MicroBatch:
    """Seven pictures with text and one text alone in rows with padding, and a row without anything."""
    rows = [ALIKE[:3], [TEXT, *ALIKE[3:5]], [], ALIKE[5:]]
    return micro_batch(rows, encoder_length=80, decoder_length=24, image_slots=9)


def trained(batch: MicroBatch) -> tuple[torch.Tensor, LossTotals, dict[str, torch.Tensor]]:
    pali = small_model()
    loss, totals = pali((), batch)
    loss.backward()
    return loss.detach(), LossTotals.from_tensor(totals), gradients(pali)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, LossTotals, dict[str, torch.Tensor]]:
    batch = packed()
    with monkeypatch.context() as patched:
        patched.setattr(Unpacking, "of", lambda *_: None)
        return trained(batch)


@pytest.mark.parametrize("multiple", [0, 1, 16])
def test_loss_and_gradients_are_those_of_dense_attention(multiple: int, dense: tuple) -> None:
    batch = packed()
    if multiple:
        batch = batch.trimmed(TOKENS_PER_IMAGE).joined(multiple)
    loss, totals, gradient = trained(batch)
    assert all(mask.unpacking for mask in (batch.encoder_mask, batch.decoder_mask, batch.cross_mask))
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


def test_rows_stay_where_examples_alone_would_not_have_fewer_scores() -> None:
    one_per_row = micro_batch([[each] for each in ALIKE])
    beside_a_long_one = micro_batch([[*ALIKE[:6], example(9, inputs=90)]])
    nothing = packed().emptied()
    for batch in (one_per_row, beside_a_long_one, nothing):
        assert batch.encoder_mask.unpacking is None
        assert batch.joined() is batch
