"""The search finds what playing every layout finds; more of anything never makes a plan slower; parts add up."""

import json
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from parallel.plan.hardware import GIB, Hardware, read_hardware
from parallel.plan.search import Choice, Search
from parallel.plan.step_time import balanced
from train.plan import layout_name, no_layout, read_config, reason, table
from train.settings.planning import choose_layout, make_search, overrides, this_hardware

H100 = read_hardware("h100_sxm", ["overhead_gib=0.1", "communicator_mib=1"])
WORDS = ("vit=large", "mt5=base", "data.global_batch_size=64", "data.num_streams=8", "run.steps=100")


@cache
def search(gpus: int = 8, memory_gib: float = 14.0, words: tuple[str, ...] = WORDS) -> Search:
    return make_search(read_config(words), replace(H100, memory_gib=memory_gib), gpus)


def best(hardware: Hardware, gpus: int = 8) -> float:
    found = replace(search(gpus), hardware=hardware, _times={}).run(most=1)
    return found[0].seconds if found else float("inf")


@cache
def found() -> list[Choice]:
    return search().run(most=5)


def test_the_first_choice_is_that_of_playing_every_layout() -> None:
    every = replace(search(), _times={}, played=0)
    exhaustive = every.run(most=5, exhaustive=True)
    assert [choice.seconds for choice in found()] == pytest.approx([choice.seconds for choice in exhaustive])
    assert layout_name(found()[0]) == layout_name(exhaustive[0])
    assert every.played > 3 * search().played
    assert make_search(read_config(WORDS), H100, 8).played == 0


def test_every_choice_fits_and_its_parts_add_up() -> None:
    for choice in found():
        (phase,) = choice.phases.values()
        assert phase.memory_bytes <= 14 * GIB and 0 < phase.mfu < 1
        assert sum(phase.time.parts().values()) == pytest.approx(phase.time.seconds, rel=1e-6)
        assert phase.time.seconds * 100 == pytest.approx(choice.seconds)


def test_more_memory_and_faster_parts_never_make_a_plan_slower() -> None:
    base = replace(H100, memory_gib=14.0)
    now = best(base)
    assert [best(replace(base, memory_gib=gib)) for gib in (10.0, 14.0, 20.0, 80.0)] == sorted(
        (best(replace(base, memory_gib=gib)) for gib in (10.0, 14.0, 20.0, 80.0)), reverse=True
    )
    for change in (
        {"bf16": replace(base.bf16, peak_tflops=2000.0)},
        {"node": replace(base.node, gb_per_s=900.0)},
        {"network": replace(base.network, gb_per_s=100.0)},
        {"memory_gb_per_s": 6700.0},
        {"launch_us": 1.0},
    ):
        assert best(replace(base, **change)) <= now, change


def test_no_layout_names_the_smallest_number_that_would_do() -> None:
    tight = search(1, 4.0)
    assert tight.run() == []
    config = read_config(WORDS)
    with pytest.raises(
        ConfigurationError, match=r"gpus=1 hold no layout of phase frozen_224, which needs .* GiB .*; take \d+"
    ):
        raise no_layout(tight, config, tight.hardware)


def test_overrides_choose_the_layout_that_was_found() -> None:
    config, choice = read_config(WORDS), found()[0]
    words = overrides(choice, config, 8)
    again = read_config([*WORDS, *words])
    (phase,) = choice.phases.values()
    for name in ("tensor", "pipeline", "virtual_stages", "zero_stage", "micro_batch_size", "recompute", "gather",
                 "reduce"):  # fmt: skip
        assert getattr(again.parallel, name) == getattr(phase.parallel, name)
    assert again.parallel.cut == list(phase.cut)


def test_auto_takes_the_first_choice_and_keeps_it_while_the_world_stays(tmp_path: Path) -> None:
    words = [*WORDS, "parallel=auto", "parallel.hardware=a100_80", f"run.folder={tmp_path}"]
    config = choose_layout(read_config(words), 4)
    first = make_search(read_config(WORDS), read_hardware("a100_80"), 4, keep_streams=True).run(most=1)[0]
    assert config.parallel.tensor == first.parallel.tensor and config.parallel.zero_stage == first.parallel.zero_stage
    assert config.phases["frozen_224"].micro_batch_size == first.parallel.micro_batch_size and not config.parallel.auto
    kept = tmp_path / "layout.json"
    plain = json.loads(kept.read_text(encoding="utf-8"))
    plain["parallel"]["timeout_s"] = 500.0
    kept.write_text(json.dumps(plain), encoding="utf-8")
    assert choose_layout(read_config(words), 4).parallel.timeout_s == 500.0
    assert choose_layout(read_config(words), 8).parallel.timeout_s == 600.0  # another world: planned anew
    kept.write_text("{", encoding="utf-8")
    assert choose_layout(read_config(words), 4).parallel == config.parallel
    assert this_hardware(None).name == "CPU core"


def test_the_table_gives_a_reason_for_every_row() -> None:
    rows = table(found(), search())
    assert rows.row_count == 5 and reason(found()[0], found()[0]) == "fastest"
    assert all(reason(choice, found()[0]).startswith("+") for choice in found()[1:])


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_balanced_cut_is_the_best_of_all(number: int) -> None:
    seconds = [3.0, 1.0, 4.0, 1.5, 5.0, 2.5, 0.0, 6.0]

    def longest(starts: tuple[int, ...]) -> float:
        return max(sum(seconds[a:b]) for a, b in zip(starts, [*starts[1:], len(seconds)], strict=True))

    every = [longest((0, *starts)) for starts in combinations(range(1, len(seconds)), number - 1)]
    assert longest(tuple(balanced(seconds, number))) == pytest.approx(min(every))
