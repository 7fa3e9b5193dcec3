"""Signals that ask a run to end: the first one lets it save, a second Ctrl-C ends it at once."""

import signal
from collections.abc import Iterator

import pytest

from train.health.signals import StopSignals


@pytest.fixture
def interrupt() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    one = StopSignals()
    yield one
    one.restore()
    assert {number: signal.getsignal(number) for number in StopSignals.SIGNALS} == before


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_the_first_signal_of_any_kind_is_remembered_and_kills_nothing(
    interrupt: StopSignals, number: signal.Signals
) -> None:
    assert not interrupt.requested
    signal.raise_signal(number)
    assert interrupt.requested


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_ctrl_c_after_any_signal_ends_the_process(interrupt: StopSignals, first: signal.Signals) -> None:
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_scheduler_that_asks_again_is_not_in_a_hurry(interrupt: StopSignals) -> None:
    """Slurm sends SIGUSR1 before the time limit and SIGTERM at it, while the checkpoint is written."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    assert interrupt.requested
