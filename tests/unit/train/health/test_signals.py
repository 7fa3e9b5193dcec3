"""Signals end a run: after the first one it saves and ends, a second Ctrl-C ends it at once."""

import signal
from collections.abc import Iterator

import pytest

from train.health.signals import StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    one = StopSignals()
    yield one
    one.restore()
    assert {number: signal.getsignal(number) for number in StopSignals.SIGNALS} == before


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_the_first_signal_of_any_kind_is_remembered_and_kills_nothing(
    signals: StopSignals, number: signal.Signals
) -> None:
    assert not signals.requested
    signal.raise_signal(number)
    assert signals.requested


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_ctrl_c_after_any_signal_ends_the_process(signals: StopSignals, first: signal.Signals) -> None:
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_more_signals_of_a_scheduler_leave_the_time_to_save(signals: StopSignals) -> None:
    """Slurm sends SIGUSR1 before the time limit and SIGTERM at it, while the checkpoint is written."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    assert signals.requested
