"""What a rank waits for its peers: real collectives between two processes, one of them late."""

import _thread
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from benchmarks.world import run_world
from parallel import communication_time as waiting
from parallel.communication_time import CommunicationWait
from parallel.distributed import launch, start

original = dist.Work.wait


class Clock:
    """Counts how often rank 1 has come late, whatever real time that took."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank, self.looks = folder, rank, 0

    def perf_counter(self) -> float:
        now = float(len(list(self.folder.glob("came_*"))))
        self.looks += 1
        if self.rank == 0 and self.looks % 2:  # a wait begins
            (self.folder / f"waits_{now:.0f}").touch()
        return now

    def come_late(self) -> None:
        """Of rank 1: arrive once rank 0 is waiting."""
        number = len(list(self.folder.glob("came_*")))
        end = time.monotonic() + 60
        while not (self.folder / f"waits_{number}").exists():
            assert time.monotonic() < end, "rank 0 looks at no clock when it begins to wait"
            time.sleep(0.001)
        (self.folder / f"came_{number}").touch()


def late(folder: Path) -> None:
    this = launch()
    start(this, 60)
    clock, x = Clock(folder, this.rank), torch.ones(1000)
    message = [dist.P2POp(dist.isend, x, 0)] if this.rank == 1 else [dist.P2POp(dist.irecv, x, 1)]
    works = [
        lambda: dist.all_reduce(x),
        lambda: dist.all_gather([x.clone(), x.clone()], x),
        lambda: [work.wait() for work in dist.batch_isend_irecv(message)],
    ]
    dist.all_reduce(x)
    with pytest.MonkeyPatch.context() as patch, CommunicationWait(torch.device("cpu")) as counted:
        patch.setattr(waiting, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        for work in works:
            if this.rank == 1:
                clock.come_late()
            work()
        (folder / f"{this.rank}").write_text(f"{counted.seconds()} {counted.seconds()}", encoding="utf-8")
    assert dist.Work.wait is original


def test_who_comes_early_waits(tmp_path: Path) -> None:
    run_world(2, late, tmp_path)
    assert (tmp_path / "0").read_text(encoding="utf-8") == "3.0 0.0"
    assert (tmp_path / "1").read_text(encoding="utf-8") == "0.0 0.0"


def test_another_threads_waits_and_waits_within_waits_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's thread has collectives of its own; a collective that waits inside is one wait."""
    ticks = iter(range(100))
    monkeypatch.setattr(waiting, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    counted = CommunicationWait(torch.device("cpu"))
    monkeypatch.setattr(dist.Work, "wait", lambda: dist.Work.inner())
    monkeypatch.setattr(dist.Work, "inner", lambda: 7, raising=False)
    with counted:
        counted._wrap(dist.Work, "inner")
        assert dist.Work.wait() == 7 and counted.seconds() == 1.0
        counted.thread += 1
        assert dist.Work.wait() == 7 and counted.seconds() == 0.0
    assert dist.Work.inner() == 7 and next(ticks) == 2, "nothing is wrapped any more"


class Event:
    """A CUDA event whose time is the number of those recorded before; it has passed once the device is so far."""

    recorded = 0
    device_is_at = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.recorded
        Event.recorded += 1

    def query(self) -> bool:
        return self.at < Event.device_is_at

    def elapsed_time(self, end: "Event") -> float:
        return 1000.0 * (end.at - self.at)  # ms


def test_on_a_gpu_events_count_once_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring never waits for the device; what another stream does is no wait, and neither is what waits inside."""
    stream = {"current": "own", "default": "own"}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream["current"])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: stream["default"])
    monkeypatch.setattr(Event, "recorded", 0)
    for name in waiting.NCCL_CALLS:
        monkeypatch.setattr(dist.ProcessGroup, name, lambda: dist.Work.wait(), raising=False)
    monkeypatch.setattr(dist.Work, "wait", lambda: 7)
    unwrapped = dist.ProcessGroup.allreduce
    with CommunicationWait(torch.device("cuda")) as counted:
        assert [dist.ProcessGroup.allreduce(), dist.ProcessGroup.send(), dist.Work.wait()] == [7, 7, 7]
        stream["current"] = "prefetching"
        dist.ProcessGroup.broadcast()
        assert Event.recorded == 6 and counted.seconds() == 0.0
        monkeypatch.setattr(Event, "device_is_at", 3)  # between the second pair
        assert counted.seconds() == 1.0 and counted.seconds() == 0.0
        monkeypatch.setattr(Event, "device_is_at", 6)
        assert counted.seconds() == 2.0 and not counted.pending
    assert dist.ProcessGroup.allreduce is unwrapped


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_methods_of_torch_bind_again_afterwards(device: str) -> None:
    held = [(dist.Work, "wait"), *((dist.ProcessGroup, name) for name in waiting.NCCL_CALLS)]
    before = [vars(owner)[name] for owner, name in held]
    with CommunicationWait(torch.device(device)):
        assert vars(dist.Work)["wait"] is not before[0]
    assert all(vars(owner)[name] is method for (owner, name), method in zip(held, before, strict=True))


def test_on_a_gpu_a_checkpoint_that_is_written_hides_no_wait_and_adds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waits in the same stream; autograd's thread, which Python has not started, is the step's."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "own")
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "own")
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "device_is_at", 100)
    writes, trained = threading.Event(), threading.Event()

    def wait(where: str) -> None:
        if where == "checkpoint":
            writes.set()
            assert trained.wait(60)

    monkeypatch.setattr(dist.Work, "wait", wait)
    with CommunicationWait(torch.device("cuda")) as counted:
        writer = threading.Thread(target=dist.Work.wait, args=("checkpoint",))
        writer.start()
        assert writes.wait(60)
        dist.Work.wait("step")  # type: ignore[arg-type]
        assert counted.seconds() == 1.0
        _thread.start_new_thread(lambda: (dist.Work.wait("autograd"), trained.set()), ())  # type: ignore[arg-type]
        writer.join(60)
        assert counted.seconds() == 1.0
