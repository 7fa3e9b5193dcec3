"""What the first rank finds, or fails at, is what every rank gets."""

from types import SimpleNamespace

import pytest

from common.errors import ConfigurationError, RunStopped
from parallel.layout import Layout
from tests.unit.train.ranks import Ranks


def ask(world: Ranks, answer) -> list[object]:  # type: ignore[no-untyped-def]
    def one(rank: int) -> object:
        layout = SimpleNamespace(rank=rank, world_size=world.size)
        return Layout.broadcast_from_main(layout, lambda: answer(rank))  # type: ignore[arg-type]

    return world.run(one)


def test_the_first_rank_answers_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(Ranks(3, monkeypatch), lambda rank: f"of {rank}") == ["of 0"] * 3


@pytest.mark.parametrize("error", [ConfigurationError("in use"), RunStopped("full", True), OSError(5, "no", "/x")])
def test_what_stops_the_first_rank_stops_all_and_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(rank: int) -> None:
        assert rank == 0, "nobody else is asked"
        raise error

    raised = ask(Ranks(2, monkeypatch), fails)
    assert [(type(each), str(each)) for each in raised] == [(type(error), str(error))] * 2
