"""A rank counts all positions that it computes, and an error of reading on one rank is raised on all."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import ConfigurationError, StorageFailed
from data.error_budget import ErrorBudgetExceeded
from data.packing import Rows, RowShape, empty_rows, micro_batches
from data.stream import StepData
from tests.unit.train.ranks import group, layout
from train.step.batch import rank_stats
from train.step.reader import open_on_all_ranks
from train.step.reduction import RankStats, SkipCauses, in_lockstep, reduce_stats
from train.step.step_reader import StepReader

TOKENS_PER_IMAGE = 4
SHAPE = RowShape(
    encoder_length=64, decoder_length=32, images_per_row=2, image_size=28, tokens_per_image=TOKENS_PER_IMAGE
)
CPU = torch.device("cpu")


def reader(rows: list[Rows], multiple: int, device: str = "cpu", pipeline: int = 1, dropout_rate: float = 0.0) -> Any:
    """Return a reader of these micro-batches; `multiple` is `data.trim_multiple`."""
    config: Any = SimpleNamespace(
        data=SimpleNamespace(trim_multiple=multiple),
        mixture={},
        pali=SimpleNamespace(tower=""),
        parallel=SimpleNamespace(pipeline=pipeline),
        model=SimpleNamespace(image_size=28, dropout_rate=dropout_rate),
        vit=SimpleNamespace(num_tokens=lambda size: TOKENS_PER_IMAGE),
    )
    own = layout()
    own.device = torch.device(device)
    arrays = SimpleNamespace(read=lambda step: StepData(rows, []), prefetch=0)
    return StepReader(config, own, arrays)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("multiple", "positions", "of_an_empty_one"), [(0, 4 * 96, 2 * 96), (8, 2 * 24 + 2 * 16, 2 * 16)]
)
def test_computed_positions_are_counted(multiple: int, positions: int, of_an_empty_one: int) -> None:
    """Two micro-batches of two rows; the longest text has 10 tokens, the longest target 3."""
    rows = empty_rows(4, SHAPE)
    for row, (text, target) in enumerate(((10, 3), (5, 2), (1, 1))):
        rows["encoder_segments"][row, :text] = 1
        rows["decoder_segments"][row, :target] = 1
    one = reader(micro_batches(rows, 2, SHAPE), multiple, dropout_rate=0.1)  # else a CPU joins the rows
    read = one.read(1)
    own = rank_stats(read.data, one.empty, one.config)
    assert (own.positions, own.empty_positions) == (positions, of_an_empty_one)
    assert (own.encoder_tokens, own.num_targets, own.images) == (16, 6, 0)
    assert read.stats.positions == positions and read.stats.added_micro_batches == 0
    filled = one.fill(replace(read, stats=replace(read.stats, num_micro_batches=5)))
    assert sum(batch.num_positions for batch in filled) == positions + 3 * of_an_empty_one
    assert [batch.num_targets for batch in filled] == [5, 1, 0, 0, 0]


@pytest.mark.parametrize(("device", "lengths"), [("cpu", (144, 16)), ("cuda", (256, 32))])
def test_lengths_on_a_gpu_are_whole_blocks_of_its_kernels(device: str, lengths: tuple[int, int]) -> None:
    """A kernel is compiled for each length; the whole row of the decoder is shorter than a block."""
    shape = replace(SHAPE, encoder_length=640)
    rows = empty_rows(1, shape)
    rows["encoder_segments"][0, :140] = rows["decoder_segments"][0, :9] = 1
    (batch,) = reader([rows], 16, device, dropout_rate=0.1).read(1).data.micro_batches
    assert (batch.encoder_tokens.shape[1], batch.decoder_tokens.shape[1]) == lengths


@pytest.mark.parametrize(
    ("dropout_rate", "pipeline", "device", "rows"),
    [(0.0, 1, "cpu", 1), (0.1, 1, "cpu", 2), (0.0, 2, "cpu", 2), (0.0, 1, "cuda", 2)],
)
def test_rows_are_joined_where_that_only_saves_time(dropout_rate: float, pipeline: int, device: str, rows: int) -> None:
    packed = empty_rows(2, SHAPE)
    for segment in range(1, 5):
        packed["encoder_segments"][:, 10 * segment - 10 : 10 * segment] = segment
        packed["decoder_segments"][:, 3 * segment - 3 : 3 * segment] = segment
    one = reader([packed], 8, device, pipeline, dropout_rate)
    data = one.read(1).data
    assert data.micro_batches[0].num_rows == rows
    assert rank_stats(data, one.empty, one.config).encoder_tokens == 80


def test_a_disk_that_fails_on_one_rank_ends_all_alike_and_one_of_them_prints_it() -> None:
    failed = StorageFailed("/data/x.tar: Input/output error")
    assert failed.alone
    with pytest.raises(StorageFailed, match="Input/output") as raised:
        reduce_stats(RankStats(error=failed), SkipCauses(), group())
    assert not raised.value.alone


def test_batches_come_until_one_cannot_be_read() -> None:
    full = [StepData([number], [SimpleNamespace()]) for number in (1, 2)]  # type: ignore[list-item]
    error: StepData[int] = StepData([], [], error=ErrorBudgetExceeded("too many"))
    read = []
    with pytest.raises(ErrorBudgetExceeded, match="too many"):
        for batch in in_lockstep([*full, error], CPU):
            read.append(batch)
    assert read == full
    assert list(in_lockstep(full, CPU)) == full


@pytest.mark.parametrize("error", [StorageFailed("/data/x.tar: no answer."), ConfigurationError("No shards.")])
def test_all_ranks_raise_what_one_raises_as_it_opens_its_shards(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.step.reduction.gather_objects", lambda own, group: [*own, error])
    with pytest.raises(type(error), match=str(error)):
        open_on_all_ranks(lambda: SimpleNamespace())  # type: ignore[arg-type, return-value]
