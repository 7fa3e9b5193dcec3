"""Micro-batches are copied beside the device's work, in an order that the work of the step keeps."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.batch import ARRAYS, MicroBatch
from parallel.copy_stream import CopyStream
from tests.unit.gpu_on_meta import META, Waits
from tests.unit.model.examples import example, micro_batch

CPU = torch.device("cpu")


def batches() -> list[MicroBatch]:
    return [micro_batch([[example(1), example(2, images=0)]], 60, 20) for _ in range(2)]


def test_a_cpu_keeps_the_tensors() -> None:
    own = batches()
    copied = CopyStream(CPU).copy(own)
    assert all(new.images is old.images for new, old in zip(copied, own, strict=True))


def test_copies_have_a_stream_that_later_work_waits_for(monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    """`meta` takes the place of the GPU, and a list that of its queues."""
    calls: list[Any] = []
    to, copies = MicroBatch.to, SimpleNamespace(name="copies")
    current = SimpleNamespace(wait_stream=lambda stream: calls.append(("wait for", stream.name)))

    @contextmanager
    def stream(one: Any) -> Any:
        calls.append(("begin", one.name))
        yield
        calls.append(("end", one.name))

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(MicroBatch, "to", lambda batch, device: (calls.append("copy"), to(batch, device))[1])
    recorded: list[tuple[int, Any]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((id(tensor), stream)))
    one = CopyStream(META)
    one._stream = copies  # type: ignore[assignment]
    moved = one.copy(batches())
    assert calls == [("begin", "copies"), "copy", "copy", ("end", "copies"), ("wait for", "copies")]
    tensors = [getattr(batch, name) for batch in moved for name in (*ARRAYS, "target_positions")]
    masks = [mask for batch in moved for mask in (batch.encoder_mask, batch.decoder_mask, batch.cross_mask)]
    tensors += [mask.host_blocks.packed for mask in masks]
    assert all(x.device == META for x in tensors) and waits.lines == {}
    assert {key for key, _ in recorded} == {id(x) for x in tensors} and all(own is current for _, own in recorded)

    recorded.clear()
    one.copy(moved)
    assert not recorded, "they are of the stream that computes"
