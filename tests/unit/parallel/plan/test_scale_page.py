"""The tables of docs/scale.md are what the plan predicts today: memory beside measured bytes, published speeds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.published import RUNS, rows
from benchmarks.scale import CASES, predicted
from parallel.plan.hardware import GIB, read_hardware
from train.phases import for_phase, spans
from train.plan import read_config
from train.settings.planning import make_search

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def cells(title: str) -> Iterator[list[str]]:
    """Yield the rows of the first table below a title."""
    table = PAGE.split(f"### {title}\n")[1].split("\n|---")[1].partition("\n")[2].partition("\n\n")[0]
    for line in table.splitlines():
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("row", "name"), list(enumerate(CASES)), ids=CASES)
def test_memory_and_collectives_are_those_of_the_page_and_near_the_measured_ones(row: int, name: str) -> None:
    model, layout, measured, written, deviation, calls, size, equal = list(cells("One rank of many"))[row]
    assert (model, layout) == CASES[name][:2]
    peak, planned = predicted(CASES[name].command)
    gib = peak.tensors / GIB
    assert f"{gib:.3f} GiB" == written
    ratio = gib / float(measured.removesuffix(" GiB")) - 1
    assert abs(float(deviation.removesuffix(" %")) / 100 - ratio) < 1e-3 and -0.01 < ratio < 0.03
    assert (calls, size, equal) == (
        f"{planned.calls.total():,}",
        f"{planned.whole_bytes.total() / 1e9:.3f} GB",
        "equal",
    )


def test_memory_and_steps_of_the_presets_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `tp")]
    assert len(lines) == 8
    words, predictions = ["model=pali_17b", "phases=chained", "run.steps=392325"], []
    for line in lines:
        preset, gpus = (cell.strip() for cell in line.strip("|").split("|")[:2])
        config = read_config([*words, f"parallel={preset.split('`')[1]}"])
        search, found = make_search(config, read_hardware("h100_sxm"), int(gpus)), []
        for span, phase in zip(spans(config), search.phases, strict=True):
            model, starts = search.step_model(phase, for_phase(config, span).parallel)
            found.append((max(peak.total for peak in search.peaks(model, starts)) / GIB, model.time(starts).seconds))
        (frozen, first), (trained, second) = found
        predictions.append(
            f"| {preset} | {gpus} | {frozen:.1f} GiB | {trained:.1f} GiB | {first:.1f} s, {second:.1f} s |"
        )
    assert predictions == lines


def test_predicted_speeds_are_those_of_the_page() -> None:
    found = [
        [run.software, f"{run.sequences_per_s:,.0f}", f"{raw:,.0f}", f"{raw / run.sequences_per_s - 1:+.0%}",
         f"{calibrated:,.0f}", f"{calibrated / run.sequences_per_s - 1:+.0%}"]
        for run, raw, calibrated in rows(RUNS, "a100_80")
    ]  # fmt: skip
    written = [[cell.replace(" %", "%") for cell in (row[0], *row[2:])] for row in cells("Published encoder-decoders")]
    assert found == written
