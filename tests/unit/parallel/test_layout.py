"""Every rank gets the result, or the exception, of the main rank."""

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


def test_every_rank_gets_the_main_rank_s_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(Ranks(3, monkeypatch), lambda rank: f"of {rank}") == ["of 0"] * 3


@pytest.mark.parametrize("error", [ConfigurationError("in use"), RunStopped("full", True), OSError(5, "no", "/x")])
def test_an_error_of_the_main_rank_is_raised_on_all_and_printed_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(rank: int) -> None:
        assert rank == 0, "only the main rank calls it"
        raise error

    raised = ask(Ranks(2, monkeypatch), fails)
    assert [(type(each), str(each)) for each in raised] == [(type(error), str(error))] * 2
