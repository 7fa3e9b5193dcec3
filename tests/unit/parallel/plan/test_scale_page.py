"""The tables of docs/scale.md are what the plan predicts today: memory beside measured bytes, published speeds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.published import RUNS, rows
from benchmarks.scale import CASES, predicted
from parallel.plan.hardware import GIB

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "scale.md").read_text(encoding="utf-8")
MEASURED = ("z0", "z1", "z2", "z3", "tp2seq", "pp2b", "z3tp2", "17b_pp")  # in the order of the page


def cells(title: str) -> Iterator[list[str]]:
    """Yield the rows of the first table below a title."""
    table = PAGE.split(f"### {title}\n")[1].split("\n|---")[1].partition("\n")[2].partition("\n\n")[0]
    for line in table.splitlines():
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("row", "case"), list(enumerate(MEASURED)), ids=MEASURED)
def test_predicted_memory_is_that_of_the_page_and_near_the_measured_bytes(row: int, case: str) -> None:
    model, _, measured, written, deviation = list(cells("Memory of one rank"))[row]
    assert f"model={model} " in CASES[case]
    gib = predicted(CASES[case].split()).tensors / GIB
    assert f"{gib:.3f} GiB" == written
    ratio = gib / float(measured.removesuffix(" GiB")) - 1
    assert f"{ratio:+.1%}".replace("%", " %") == deviation and abs(ratio) < 0.01


def test_predicted_speeds_are_those_of_the_page() -> None:
    found = [
        [run.software, f"{run.sequences_per_s:,.0f}", f"{raw:,.0f}", f"{raw / run.sequences_per_s - 1:+.0%}",
         f"{calibrated:,.0f}", f"{calibrated / run.sequences_per_s - 1:+.0%}"]
        for run, raw, calibrated in rows(RUNS, "a100_80")
    ]  # fmt: skip
    written = [[cell.replace(" %", "%") for cell in (row[0], *row[2:])] for row in cells("Published encoder-decoders")]
    assert found == written
