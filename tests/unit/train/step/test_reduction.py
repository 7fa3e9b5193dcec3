"""Statistics are reduced over one, two or four simulated leaders of replicas, compared by value."""

import pytest
import torch

from data.error_budget import ErrorBudgetExceeded
from data.stream import StepData
from tests.unit.train.ranks import Ranks, group, layout
from train.health.stragglers import RankTimes
from train.step import reduction
from train.step.reduction import (
    PendingReports,
    RankReport,
    RankStats,
    SkipCauses,
    StepStats,
    gather_to_main,
    in_lockstep,
    reduce_stats,
)

CPU = torch.device("cpu")
WORLD = 4
# The data that each replica read.
READ = [
    RankStats(
        num_micro_batches=2 + number, num_targets=10 + number, encoder_tokens=100 + number, images=3 + number,
        examples={"ocr": 1, "vqa": number}, components={"a": number, "b": 2, "c": 0}, truncated=number,
        positions=1000 * (2 + number), empty_positions=500,
        skipped={"webli/no text": 1 + number} | ({"cc3m/broken": 7} if number == 1 else {}),
    )
    for number in range(WORLD)
]  # fmt: skip


def reduced(monkeypatch: pytest.MonkeyPatch, replicas: int, rounds: int = 1) -> tuple[list[list[StepStats]], Ranks]:
    """Return the result of every leader in each of `rounds` steps."""
    ranks = Ranks(replicas, monkeypatch)

    def steps(rank: int) -> list[StepStats]:
        causes, own = SkipCauses(), group(rank, replicas)
        return [reduce_stats(READ[rank], causes, own) for _ in range(rounds)]

    results = ranks.run(steps)
    assert all(isinstance(each, list) for each in results), results
    return results, ranks  # type: ignore[return-value]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_sums_are_of_the_global_batch_and_maxima_of_replicas(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    read = READ[:replicas]
    added = sum(read[-1].num_micro_batches - each.num_micro_batches for each in read)
    expected = StepStats(
        num_micro_batches=1 + replicas,
        num_targets=sum(each.num_targets for each in read),
        encoder_tokens=sum(each.encoder_tokens for each in read),
        images=sum(each.images for each in read),
        examples={"ocr": replicas, "vqa": sum(range(replicas))},
        components={"a": sum(range(replicas)), "b": 2 * replicas, "c": 0},
        truncated=sum(range(replicas)),
        skipped=({"cc3m/broken": 7} if replicas > 1 else {}) | {"webli/no text": sum(range(1, replicas + 1))},
        positions=sum(each.positions for each in read) + added * 500,
        added_micro_batches=added,
    )
    results, _ = reduced(monkeypatch, replicas)
    assert results == [[expected]] * replicas


def test_only_a_new_cause_needs_a_second_exchange_and_no_count_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    results, ranks = reduced(monkeypatch, 4, rounds=5)
    assert [step.skipped for step in results[0]] == [{"cc3m/broken": 7, "webli/no text": 10}] * 5
    assert ranks.calls == {"all_reduce": 5, "all_gather_object": 1}


def test_the_table_of_causes_is_bounded_and_counts_the_rest_by_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "MOST_CAUSES", 3)
    ranks = Ranks(2, monkeypatch)

    def steps(rank: int) -> list[dict[str, int]]:
        causes, own = SkipCauses(), group(rank, 2)
        skipped = [{f"webli/{rank} {step}": 1, "cc3m/same": 2} for step in range(4)]
        return [reduce_stats(RankStats(skipped=each), causes, own).skipped for each in skipped]

    first, second = ranks.run(steps)
    assert first == second == [
        {"cc3m/same": 4, "webli/0 0": 1, "webli/1 0": 1},
        *[{"cc3m/same": 4, "webli/other causes": 2}] * 3,
    ]  # fmt: skip
    assert ranks.calls["all_gather_object"] == 2


def reported(rank: int, own: RankReport) -> StepStats:
    """Return statistics with the reports of two ranks."""
    return PendingReports(own, layout(rank, 2)).add_to(StepStats(1, 1, 1, 1, {}))


def test_one_rank_that_stops_or_saves_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stop", "save"):
        found = Ranks(2, monkeypatch).run(lambda rank, name=name: reported(rank, RankReport(**{name: rank == 1})))
        assert [(each.stop, each.save) for each in found] == [(name == "stop", name == "save")] * 2  # type: ignore


def test_the_fullest_rank_and_the_longest_wait_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, monkeypatch)
    found = ranks.run(lambda rank: reported(rank, RankReport(0.5 * rank, 2**40 - rank)))
    assert [(each.data_wait_s, each.memory_bytes) for each in found] == [(0.5, 2**40)] * 2  # type: ignore[union-attr]
    assert ranks.calls == {"all_reduce": 1}


def test_times_are_sent_in_whole_microseconds_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(rank: int) -> torch.Tensor:
        return reported(rank, RankReport(times=RankTimes(1.5 + rank, 0.25, 0.125))).times

    for found in Ranks(2, monkeypatch).run(times):
        assert found.tolist() == [[1.5, 0.25, 0.125], [2.5, 0.25, 0.125]]  # type: ignore[union-attr]


def test_an_error_of_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(rank: int) -> StepStats:
        error = ErrorBudgetExceeded("most are in shard x.tar") if rank == 2 else None
        own = RankStats(examples={"ocr": 1, "vqa": 1}, error=error)
        return reduce_stats(own, SkipCauses(), group(rank, WORLD))

    errors = Ranks(WORLD, monkeypatch).run(step)
    assert [(type(each), str(each)) for each in errors] == [(ErrorBudgetExceeded, "most are in shard x.tar")] * WORLD


def batches(*numbers: int, error: bool = False) -> list[StepData[int]]:
    """Yield a batch for each number, without an example where it is 0, and last the `error`."""
    found: list[StepData[int]] = [StepData([number], [object()] * bool(number)) for number in numbers]  # type: ignore
    return found + [StepData([], [], error=ErrorBudgetExceeded("too many"))] * error


def test_batches_cost_two_numbers_each_until_a_rank_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2, monkeypatch)

    def read(rank: int, own: list[list[StepData[int]]], into: list[list[int]] | None = None) -> list[int]:
        seen: list[int] = [] if into is None else into[rank]
        for batch in in_lockstep(own[rank], CPU):
            seen += batch.micro_batches
        return seen

    assert ranks.run(lambda rank: read(rank, [batches(1, 2, 3)] * 2)) == [[1, 2, 3]] * 2
    assert ranks.calls == {"all_reduce": 3}
    found = ranks.run(lambda rank: read(rank, [batches(1, 0, 0, 0), batches(1, 2, 0, 0)]))
    assert found == [[1, 0], [1, 2]], "what is empty everywhere is left out, everywhere"

    seen: list[list[int]] = [[], []]
    errors = ranks.run(lambda rank: read(rank, [batches(1, 2), batches(1, error=True)], seen))
    assert seen == [[1], [1]] and [str(each) for each in errors] == ["too many"] * 2
    assert ranks.calls["all_gather_object"] == 1


def test_the_main_rank_gets_everything_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduction, "PIECE", 2)
    ranks = Ranks(3, monkeypatch)
    own = [[1, 2, 3], [], [4, 5, 6, 7, 8]]
    first, *others = ranks.run(lambda rank: gather_to_main(own[rank], CPU))
    assert sorted(first) == [1, 2, 3, 4, 5, 6, 7, 8] and others == [[], []]  # type: ignore[arg-type]
    assert ranks.calls == {"all_reduce": 1, "gather_object": 3}
