"""A rank's share of a step: what is computed is counted, and a rank that cannot read is no riddle to the others."""

from types import SimpleNamespace

import pytest
import torch

from common.errors import ConfigurationError, StorageFailed
from data.error_budget import ErrorBudgetExceeded
from data.objectives import NAMES
from data.packing import RowShape, empty_rows, micro_batches
from train.step.batch import Share, joiner, read_or_stop
from train.step.reader import Reading, opened_by_all
from train.step.reduction import Agreement, Local, together

TOKENS_PER_IMAGE = 4
SHAPE = RowShape(
    encoder_length=64, decoder_length=32, images_per_row=2, image_size=28, tokens_per_image=TOKENS_PER_IMAGE
)
CPU = torch.device("cpu")


def share(multiple: int) -> Share:
    """Two micro-batches of two rows; the longest text has 10 tokens, the longest target 3."""
    rows = empty_rows(4, SHAPE)
    for row, (text, target) in enumerate(((10, 3), (5, 2), (1, 1))):
        rows["encoder_segments"][row, :text] = 1
        rows["decoder_segments"][row, :target] = 1
    trim = (lambda batch: batch.trimmed(TOKENS_PER_IMAGE, multiple)) if multiple else (lambda batch: batch)
    return Share.of(Reading(micro_batches(rows, 2, SHAPE), []), trim)


@pytest.mark.parametrize(
    ("multiple", "positions", "of_an_empty_one"), [(0, 4 * 96, 2 * 96), (8, 2 * 24 + 2 * 16, 2 * 16)]
)
def test_the_positions_that_are_computed(multiple: int, positions: int, of_an_empty_one: int) -> None:
    one = share(multiple)
    facts = one.facts(TOKENS_PER_IMAGE)
    assert (facts.positions, facts.empty_positions) == (positions, of_an_empty_one)
    assert (facts.encoder_tokens, facts.num_targets, facts.images) == (16, 6, 0)
    assert Agreement(1, CPU, len(NAMES)).agree(facts).positions == positions
    filled = one.filled(5)
    assert sum(batch.num_positions for batch in filled) == positions + 3 * of_an_empty_one
    assert [batch.num_targets for batch in filled] == [5, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("dropout_rate", "pipeline", "device", "rows"),
    [(0.0, 1, "cpu", 1), (0.1, 1, "cpu", 2), (0.0, 2, "cpu", 2), (0.0, 1, "cuda", 2)],
)
def test_rows_are_joined_where_that_changes_nothing_but_time(
    dropout_rate: float, pipeline: int, device: str, rows: int
) -> None:
    config = SimpleNamespace(
        data=SimpleNamespace(trim_multiple=8),
        parallel=SimpleNamespace(pipeline=pipeline),
        model=SimpleNamespace(image_size=28, dropout_rate=dropout_rate),
        vit=SimpleNamespace(num_tokens=lambda size: TOKENS_PER_IMAGE),
    )
    packed = empty_rows(2, SHAPE)
    for segment in range(1, 5):
        packed["encoder_segments"][:, 10 * segment - 10 : 10 * segment] = segment
        packed["decoder_segments"][:, 3 * segment - 3 : 3 * segment] = segment
    one = Share.of(Reading([packed], []), joiner(config, torch.device(device)))  # type: ignore[arg-type]
    assert one.micro_batches[0].num_rows == rows
    assert one.facts(TOKENS_PER_IMAGE).encoder_tokens == 80


def test_a_source_over_its_budget_is_told_as_ranks_agree() -> None:
    def read() -> Share:
        raise ErrorBudgetExceeded("most are in shard x.tar")

    with pytest.raises(ErrorBudgetExceeded, match=r"shard x\.tar"):
        read_or_stop(read, Agreement(1, CPU))
    with pytest.raises(ErrorBudgetExceeded, match="told"):
        Agreement(1, CPU).agree(Local(stopped=ErrorBudgetExceeded("told")))


def test_a_disk_that_fails_on_one_rank_ends_all_alike_and_one_of_them_prints_it() -> None:
    failed = StorageFailed("/data/x.tar: Input/output error")
    assert failed.alone
    with pytest.raises(StorageFailed, match="Input/output") as raised:
        Agreement(1, CPU).agree(Local(stopped=failed))
    assert not raised.value.alone


def test_batches_come_until_one_cannot_be_read() -> None:
    def batches():  # type: ignore[no-untyped-def]
        yield 1
        yield 2
        raise ErrorBudgetExceeded("too many")

    read = []
    with pytest.raises(ErrorBudgetExceeded, match="too many"):
        for batch in together(batches(), CPU):
            read.append(batch)
    assert read == [1, 2]
    assert list(together([(1,), (2,)], CPU)) == [(1,), (2,)]


@pytest.mark.parametrize("error", [StorageFailed("/data/x.tar: no answer."), ConfigurationError("No shards.")])
def test_all_ranks_raise_what_one_raises_as_it_opens_its_shards(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.step.reduction.gather_objects", lambda own: [*own, error])
    with pytest.raises(type(error), match=str(error)):
        opened_by_all(lambda: SimpleNamespace())  # type: ignore[arg-type, return-value]
