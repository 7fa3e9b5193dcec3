"""Reading never waits for the device, each wait counts as that of its cause, and an error comes at its step."""

import time
from typing import Any

import pytest

from data.error_budget import ErrorBudgetExceeded
from data.packing import Rows, empty_rows
from data.stream import StepData
from tests.unit.gpu_on_meta import META, Waits
from tests.unit.train.step.test_batch import SHAPE, reader
from train.step import step_reader
from train.step.reader import read_or_error
from train.step.reduction import PendingReports, RankReport
from train.step.step_reader import StepReader

SLOW_S = 0.3


def ahead(read: Any, prefetch: int, device: str = "cpu") -> StepReader:
    """Return a reader of the rows of `read(step)`."""
    one = reader([], 8, device)
    one.reader.read, one.reader.prefetch = read, prefetch
    return StepReader(one.config, one.layout, one.reader)


def rows(step: int) -> StepData[Rows]:
    return StepData([empty_rows(1, SHAPE)], [])


def test_a_step_never_waits_for_the_device(waits: Waits) -> None:
    steps = ahead(rows, 0, "meta")
    assert steps.layout.device == META
    read = steps.read(1)
    assert PendingReports(RankReport(0.5), steps.layout).add_to(read.stats).data_wait_s == 0.5
    assert waits.lines == {}


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("slow", ["reading", "other ranks"])
def test_a_wait_for_data_does_not_count_as_one_for_other_ranks(
    slow: str, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a thread, `CommunicationWait` counts the collectives."""
    reduce_stats = step_reader.reduce_stats

    def slowly(*arguments: Any) -> Any:
        time.sleep(SLOW_S if slow == "other ranks" else 0)
        return reduce_stats(*arguments)

    def read(step: int) -> StepData[Rows]:
        time.sleep(SLOW_S if slow == "reading" else 0)
        return rows(step)

    monkeypatch.setattr(step_reader, "reduce_stats", slowly)
    with ahead(read, prefetch) as steps:
        found = steps.read(1)
    assert (found.data.data_wait_s >= SLOW_S) == (slow == "reading")
    assert (found.ranks_wait_s >= SLOW_S) == (slow == "other ranks" and prefetch > 0)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_source_over_its_budget_is_raised_at_its_step(prefetch: int) -> None:
    def read(step: int) -> StepData[Rows]:
        if step == 3:
            raise ErrorBudgetExceeded("most are in shard x.tar")
        return rows(step)

    with ahead(lambda step: read_or_error(lambda: read(step)), prefetch) as steps:
        assert len(steps.read(1).data.micro_batches) == len(steps.read(2).data.micro_batches) == 1
        with pytest.raises(ErrorBudgetExceeded, match=r"shard x\.tar"):
            steps.read(3)
