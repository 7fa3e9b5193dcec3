"""A thread prepares steps in the order of their use, and ends without leaving a collective to others."""

import threading
from typing import Any

import pytest

from common.progress import awaited
from train.step import ahead
from train.step.ahead import Ahead


def test_steps_are_prepared_in_one_order_whatever_the_thread_waits_for() -> None:
    """Every rank reads steps 1, 2 and 4 (3 is left out). So all prepare the same steps in the same order."""
    prepared: list[int] = []
    go_on = threading.Semaphore(3)

    def prepare(step: int) -> str:
        go_on.acquire()
        prepared.append(step)
        assert threading.current_thread().daemon
        return f"step {step}"

    steps = Ahead(prepare, 2)
    assert steps.read(1) == "step 1"
    go_on.release(10)
    assert [steps.read(2), steps.read(4)] == ["step 2", "step 4"]
    steps.close(together=True)
    assert prepared == [1, 2, 3, 4, 5, 6] and steps.closing


def test_an_exception_is_raised_at_its_step_and_nothing_is_prepared_after_it() -> None:
    prepared: list[int] = []

    def prepare(step: int) -> int:
        prepared.append(step)
        if step == 2:
            raise RuntimeError("Connection closed by peer")
        return step

    steps = Ahead(prepare, 3)
    assert steps.read(1) == 1
    for step in (2, 3):
        with pytest.raises(RuntimeError, match="closed by peer"):
            steps.read(step)
    steps.close(together=False)
    assert prepared == [1, 2], "the other ranks wait in the collective of step 2"


def test_no_step_ahead_is_prepared_by_the_reading_thread() -> None:
    steps = Ahead(lambda step: threading.get_ident(), 0)
    assert steps.read(1) == threading.get_ident()
    steps.close(together=True)


def test_a_thread_that_waits_for_a_dead_rank_delays_the_end_by_its_grace_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "GRACE_S", 0.05)
    forever = threading.Event()
    steps = Ahead(lambda step: step == 1 or forever.wait(), 1)
    assert steps.read(1)
    steps.close(together=False)
    assert steps._thread.is_alive()
    forever.set()


def test_the_reading_thread_names_the_one_that_it_waits_for() -> None:
    seen: list[Any] = []
    own, steps = threading.get_ident(), Ahead(lambda step: seen.append((awaited.copy(), threading.get_ident())), 0)
    steps.read(1)
    assert seen == [({}, own)]
    begun = threading.Event()

    def prepare(step: int) -> tuple[int | None, int]:
        begun.wait(10)
        return awaited.get(own), threading.get_ident()

    later = Ahead(prepare, 1)
    threading.Timer(0.1, begun.set).start()
    waited_for, thread = later.read(1)
    assert waited_for == thread != own and own not in awaited
    later.close(together=True)
