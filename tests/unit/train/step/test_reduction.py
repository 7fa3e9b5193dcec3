"""What ranks agree on, by value, with four simulated ranks that form one, two or four replicas."""

import pytest
import torch

from data.error_budget import ErrorBudgetExceeded
from tests.unit.train.ranks import Ranks
from train.health.stragglers import RankTimes
from train.step import reduction as agreement
from train.step.reduction import Agreed, Agreement, Local, gather_to_first, together

CPU = torch.device("cpu")
WORLD = 4
# By replica: what each of them read. A replica of several ranks counts the same on each.
READ = [
    Local(
        num_micro_batches=2 + number, num_targets=10 + number, encoder_tokens=100 + number, images=3 + number,
        examples=[1, number], components=[number, 2, 0], truncated=number, positions=1000 * (2 + number),
        empty_positions=500, skipped={"webli/no text": 1 + number} | ({"cc3m/broken": 7} if number == 1 else {}),
        data_wait_s=0.5 * number, memory_bytes=2**40 + number,
    )
    for number in range(WORLD)
]  # fmt: skip


def agreed(monkeypatch: pytest.MonkeyPatch, replicas: int, rounds: int = 1) -> tuple[list[list[Agreed]], Ranks]:
    """What every rank gets in each of `rounds` steps; ranks of a replica lie next to each other."""
    ranks = Ranks(WORLD, monkeypatch)

    def steps(rank: int) -> list[Agreed]:
        one = Agreement(replicas, CPU, num_objectives=2, num_components=3)
        return [one.agree(READ[rank * replicas // WORLD]) for _ in range(rounds)]

    results = ranks.run(steps)
    assert all(isinstance(each, list) for each in results), results
    return results, ranks  # type: ignore[return-value]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_sums_are_of_the_global_batch_and_maxima_of_all_ranks(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    read = READ[:replicas]
    added = sum(read[-1].num_micro_batches - each.num_micro_batches for each in read)
    expected = Agreed(
        num_micro_batches=1 + replicas,
        num_targets=sum(each.num_targets for each in read),
        encoder_tokens=sum(each.encoder_tokens for each in read),
        images=sum(each.images for each in read),
        examples=[replicas, sum(range(replicas))],
        components=[sum(range(replicas)), 2 * replicas, 0],
        truncated=sum(range(replicas)),
        data_wait_s=0.5 * (replicas - 1),
        memory_bytes=2**40 + replicas - 1,
        stop=False,
        save=False,
        skipped=({"cc3m/broken": 7} if replicas > 1 else {}) | {"webli/no text": sum(range(1, replicas + 1))},
        positions=sum(each.positions for each in read) + added * 500,
        added_micro_batches=added,
    )
    results, _ = agreed(monkeypatch, replicas)
    assert results == [[expected]] * WORLD


def test_only_a_new_cause_needs_a_second_exchange_and_no_count_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    results, ranks = agreed(monkeypatch, 4, rounds=5)
    assert [step.skipped for step in results[0]] == [{"cc3m/broken": 7, "webli/no text": 10}] * 5
    assert ranks.calls == {"all_reduce": 5, "all_gather_object": 1}


def test_the_table_of_causes_is_bounded_and_counts_the_rest_by_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST_CAUSES", 3)
    ranks = Ranks(2, monkeypatch)

    def steps(rank: int) -> list[dict[str, int]]:
        one = Agreement(2, CPU)
        skipped = [{f"webli/{rank} {step}": 1, "cc3m/same": 2} for step in range(4)]
        return [one.agree(Local(skipped=each)).skipped for each in skipped]

    first, second = ranks.run(steps)
    assert first == second == [
        {"cc3m/same": 4, "webli/0 0": 1, "webli/1 0": 1},
        *[{"cc3m/same": 4, "webli/other causes": 2}] * 3,
    ]  # fmt: skip
    assert ranks.calls["all_gather_object"] == 2


def test_one_rank_that_stops_or_saves_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stop", "save"):
        found = Ranks(2, monkeypatch).run(lambda rank, name=name: Agreement(2, CPU).agree(Local(**{name: rank == 1})))
        assert [(each.stop, each.save) for each in found] == [(name == "stop", name == "save")] * 2  # type: ignore


def test_times_are_told_in_whole_microseconds_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(rank: int) -> torch.Tensor:
        own = RankTimes(1.5 + rank, 0.25, 0.125)
        return Agreement(2, CPU).agree(Local(times=own)).times

    for found in Ranks(2, monkeypatch).run(times):
        assert found.tolist() == [[1.5, 0.25, 0.125], [2.5, 0.25, 0.125]]  # type: ignore[union-attr]


def test_what_stops_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(rank: int) -> Agreed:
        stopped = ErrorBudgetExceeded("most are in shard x.tar") if rank == 2 else None
        return Agreement(WORLD, CPU, num_objectives=2).agree(Local(examples=[1, 1], stopped=stopped))

    errors = Ranks(WORLD, monkeypatch).run(step)
    assert [(type(each), str(each)) for each in errors] == [(ErrorBudgetExceeded, "most are in shard x.tar")] * WORLD


def test_batches_cost_two_numbers_each_until_a_rank_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, monkeypatch)
    assert ranks.run(lambda rank: list(together([1, 2, 3], CPU))) == [[1, 2, 3]] * 2
    assert ranks.calls == {"all_reduce": 4}
    some = [[1, 0, 0, 0], [1, 2, 0, 0]]
    read = ranks.run(lambda rank: list(together(some[rank], CPU, lambda batch: batch == 0)))
    assert read == [[1, 0], [1, 2]], "what is empty everywhere is left out, everywhere"

    def batches(rank: int):  # type: ignore[no-untyped-def]
        yield 1
        if rank:
            raise ErrorBudgetExceeded("too many")
        yield 2

    read = [[], []]
    errors = ranks.run(lambda rank: [read[rank].append(each) for each in together(batches(rank), CPU)])
    assert read == [[1], [1]] and [str(each) for each in errors] == ["too many"] * 2
    assert ranks.calls["all_gather_object"] == 1


def test_the_first_rank_gets_everything_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "PIECE", 2)
    ranks = Ranks(3, monkeypatch)
    own = [[1, 2, 3], [], [4, 5, 6, 7, 8]]
    first, *others = ranks.run(lambda rank: gather_to_first(own[rank], CPU))
    assert sorted(first) == [1, 2, 3, 4, 5, 6, 7, 8] and others == [[], []]  # type: ignore[arg-type]
    assert ranks.calls == {"all_reduce": 1, "gather_object": 3}
