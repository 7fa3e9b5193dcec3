"""Reading never waits for the device, each wait counts as that of its cause, and an error comes at its step."""

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


class Copies(TorchDispatchMode):
    """Count the tensors of pixels that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        shares = isinstance(found, Tensor) and any(
            x.untyped_storage().data_ptr() == found.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)
        )
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and not shares and "empty" not in str(func):
            self.written.append(str(func))
        return found


@pytest.mark.parametrize("slots", [[0], [0, 1], [1], []])
def test_pixels_are_copied_once_from_their_row_to_page_locked_memory(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory of the host takes the place of page-locked memory, which needs a GPU's driver."""
    packed, locked = empty_rows(1, SHAPE), set[int]()
    for slot in slots:
        packed["images"][slot] = 7 + slot
        packed["visual_index"][0, 4 * slot : 4 * slot + 4] = 4 * slot + np.arange(4)
        packed["encoder_segments"][0, : 4 * slot + 4] = packed["decoder_segments"][0, :1] = 1
    empty_like = torch.empty_like

    def lock(x: Tensor) -> Tensor:
        locked.add(x.data_ptr())
        return x

    def pinned(x: Tensor) -> Tensor:
        return x if x.data_ptr() in locked else lock(x.clone())

    monkeypatch.setattr("train.step.batch.pins", lambda device: True)
    monkeypatch.setattr(step_reader, "pins", lambda device: True)
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory: lock(empty_like(x)))
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    steps = ahead(lambda step: StepData([packed], []), 0, "cuda")
    steps.empty = reader([packed], 8).read(1).data.micro_batches[0]
    with Copies() as copies:
        (batch,) = steps.read(1).data.micro_batches
    assert len(copies.written) == 1, copies.written
    assert batch.images.data_ptr() in locked
    assert batch.images[:, 0, 0, 0].tolist() == ([7 + slot for slot in slots] or [0])


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
