"""What `train.plan` prints of a search, by value: layouts, reasons, the table, the whole run, what would help."""

from dataclasses import replace
from typing import Any

import pytest

from common.errors import ConfigurationError
from parallel.config import ParallelConfig
from parallel.plan.campaign import simulate
from parallel.plan.hardware import GIB
from parallel.plan.peak import Peak
from parallel.plan.search import Choice, PhaseChoice
from parallel.plan.step_time import StepTime
from tests.unit.parallel.plan.tiny import FROZEN, H100, LONGER, search
from train import plan
from train.plan import PlanOptions, layout_name, read_config, reason, table, whole_run, would_help
from train.settings.planning import overrides

TIME = StepTime({"vit": 0.5, "head": 0.25}, 0.25, 0.5, 0.125, 0.0625, 0.0625, 0.25, 0.25)  # 2 s


def phase(time: StepTime = TIME, **parallel: Any) -> PhaseChoice:
    peaks = tuple(Peak(stored * GIB, 2 * GIB, 0.0, 0.0, GIB, "update") for stored in (3.0, 5.4))
    return PhaseChoice(ParallelConfig(**parallel), (0,), (), time, peaks, 0.256)


def choice(*phases: PhaseChoice) -> Choice:
    named = dict(zip(("frozen", "longer"), phases, strict=False))
    steps = (FROZEN.steps, LONGER.steps)
    return Choice(named, sum(n * one.time.seconds for n, one in zip(steps, phases, strict=False)))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "zero0; mb8"),
        ({"tensor": 2, "micro_batch_size": 1}, "tp2 zero0; mb1"),
        ({"tensor": 4, "sequence": True, "zero_stage": 1}, "tp4s zero1; mb8"),
        ({"pipeline": 2, "recompute": "block"}, "pp2 zero0; mb8 re:block"),
        ({"tensor": 2, "pipeline": 4, "virtual_stages": 2}, "tp2 pp4x2 zero0; mb8"),
        ({"zero_stage": 3, "gather": "step", "recompute": "attention"}, "zero3; mb8 gather=step re:attention"),
        ({"zero_stage": 3, "reduce": "micro_batch"}, "zero3; mb8 reduce=micro_batch"),
        ({"zero_stage": 2, "reduce": "micro_batch"}, "zero2; mb8"),
    ],
)
def test_a_layout_in_few_words(settings: dict[str, Any], name: str) -> None:
    assert layout_name(choice(phase(**settings))) == name
    second = phase(**settings, **{} if "micro_batch_size" in settings else {"micro_batch_size": 2})
    own = name.split("; ")[1].replace("mb8", "mb2")
    assert layout_name(choice(phase(**settings), second)) == f"{name} | {own}"


def test_the_reason_is_the_cause_that_costs_most_more_in_all_phases() -> None:
    best = choice(phase(), phase())
    assert reason(best, best) == "fastest"
    bubble, update = replace(TIME, bubble_s=1.0), replace(TIME, update_s=0.875)
    assert reason(choice(phase(bubble), phase()), best) == "+0.500 s bubble"
    assert reason(choice(phase(bubble), phase(update)), best) == "+0.625 s update"
    assert reason(choice(phase(bubble), phase(replace(update, bubble_s=0.75))), best) == "+0.750 s bubble"
    assert reason(choice(phase(replace(TIME, bubble_s=0.25)), phase()), best) == "+0.000 s compute vit"


def test_the_table() -> None:
    own = search(4, FROZEN, LONGER)  # batches of 24 and 8
    slow = replace(TIME, bubble_s=1.5)
    found = [choice(phase(), phase(replace(TIME, host_s=2.25))), choice(phase(slow), phase(replace(TIME, host_s=2.25)))]
    shown = table(found, own)
    assert shown.title == f"4 x {H100.name}, 79.1 GiB: predicted steps"
    assert [column.header for column in shown.columns] == [
        "", "layout", "step", "examples/s", "MFU", "memory", "bubble", "exposed", "why not first",
    ]  # fmt: skip
    assert list(zip(*(column.cells for column in shown.columns), strict=True)) == [
        ("1", "zero0; mb8 | mb8", "2.00/4.00 s", "12/2", "26%/26%", "8/8 GiB", "25%/12%", "12%/6%", "fastest"),
        ("2", "zero0; mb8 | mb8", "3.00/4.00 s", "8/2", "26%/26%", "8/8 GiB", "50%/12%", "8%/6%", "+1.000 s bubble"),
    ]


def test_the_whole_run_in_a_sentence() -> None:
    own = search(1024, replace(FROZEN, steps=100_000), replace(LONGER, steps=50_000))
    best = replace(choice(phase(), phase()), seconds=7 * 86_400.0)
    run = simulate(7 * 86_400.0, 1024, H100.devices_per_node, H100.power_w, 5.4 * GIB)
    assert whole_run(best, own) == (
        "whole run, 100,000 (frozen) + 50,000 (longer) steps: 7.0 days of training, "
        f"{run.expected_days:.1f} expected with {run.interruptions:.1f} interruptions, 90 % of runs below "
        f"{run.days_90:.1f}; {run.device_days:,.0f} GPU-days, {run.energy_mwh:,.0f} MWh; a checkpoint every "
        f"{run.interval_s / 60:.0f} minutes, {run.spare_nodes} spare nodes."
    )


def test_what_would_help_is_a_search_with_twice_of_it() -> None:
    own = search(2)
    limit = (1.0 + 1e5 / GIB) / 0.97  # 100 kB beside a process: micro-batches of 2, recomputed
    own.hardware = replace(H100, overhead_gib=1.0, communicator_mib=0.0, memory_gib=limit)
    best = own.run(most=1)[0]
    lines = would_help(best, read_config(["vit=nano", "mt5=nano"]), own)
    larger = replace(own, hardware=replace(own.hardware, memory_gib=2 * own.hardware.memory_gib), _times={}).run(1)[0]
    assert layout_name(best) == "pp2 zero0; mb2 re:attention" and layout_name(larger) == "pp2 zero0; mb8"
    assert lines[0] == (f"twice the memory: {1 - larger.seconds / best.seconds:.1%} less time ({layout_name(larger)})")
    assert lines[1:] == ["twice the network between nodes: no gain", "twice the links within a node: no gain"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "nodes=0 and gpus=0 give the size; set one of them."),
        ({"nodes": 1, "gpus": 8}, "nodes=1 and gpus=8 give the size; set one of them."),
        ({"nodes": -1}, "nodes=-1 must be at least 0."),
        ({"gpus": 1, "rows": 0}, "rows=0 must be at least 1."),
    ],
)
def test_a_size_is_given_once(settings: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        PlanOptions(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == sentence
    assert (PlanOptions(nodes=1).rows, PlanOptions(gpus=1).hardware) == (8, "h100_sxm")


WORDS = ("vit=nano", "mt5=nano", "mt5.vocab_size=1024", "data.global_batch_size=8", "data.num_streams=8",
         "run.steps=100")  # fmt: skip


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([*WORDS, "nodes=1", "rows=3", "hardware.devices_per_node=2"])
    printed = capsys.readouterr().out
    assert f"2 x {H100.name}, 79.1 GiB: predicted steps" in printed
    config = read_config(WORDS)
    own = plan.make_search(config, replace(H100, devices_per_node=2), 2)
    found = own.run(most=3)
    assert " ".join(overrides(found[0], config, 2)) in printed
    assert whole_run(found[0], own) in printed and f"played {own.played} layouts in " in printed
    assert printed.count("zero") == 3 + 1 + sum("less time" in line for line in printed.splitlines())
    assert "- twice the memory: no gain" in printed


def test_settings_that_are_not_given_are_those_of_a_web_corpus() -> None:
    config = read_config(["vit=nano", "mt5=nano"])
    assert (list(config.phases), config.run.steps, config.tracker.name) == (["frozen_224"], 382_325, "none")
    assert config.data.global_batch_size == 4096
    assert read_config([*WORDS, "phases=full_224"]).phases.keys() == {"full_224"}
