"""Signals that ask a run to end: the first one lets it save, a second Ctrl-C ends it at once."""

import signal
from collections.abc import Iterator

import pytest

from train.health.signals import Interrupt


@pytest.fixture
def interrupt() -> Iterator[Interrupt]:
    before = {number: signal.getsignal(number) for number in Interrupt.SIGNALS}
    one = Interrupt()
    yield one
    one.restore()
    assert {number: signal.getsignal(number) for number in Interrupt.SIGNALS} == before


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_the_first_signal_of_any_kind_is_remembered_and_kills_nothing(
    interrupt: Interrupt, number: signal.Signals
) -> None:
    assert not interrupt.asked
    signal.raise_signal(number)
    assert interrupt.asked


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_ctrl_c_after_any_signal_ends_the_process(interrupt: Interrupt, first: signal.Signals) -> None:
    signal.raise_signal(first)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_scheduler_that_asks_again_is_not_in_a_hurry(interrupt: Interrupt) -> None:
    """Slurm sends SIGUSR1 before the time limit and SIGTERM at it, while the checkpoint is written."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        signal.raise_signal(number)
    assert interrupt.asked
