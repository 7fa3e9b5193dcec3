"""The bytes that `benchmarks.parallel` expects a rank to send are those that it counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parallel import _by_group, measure
from tests.distributed.world import run_world

CASES: list[dict[str, Any]] = [
    {"zero_stage": 2},
    {"tensor": 2, "zero_stage": 3, "sequence": True},
    {"tensor": 2, "pipeline": 2, "virtual_stages": 2},
]


def measure_all(folder: Path) -> None:
    for number, settings in enumerate(CASES):
        (folder / str(number)).mkdir(exist_ok=True)
        measure(folder / str(number), settings, repeats=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("formulas")
    run_world(4, measure_all, found)
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(settings) for settings in CASES])
def test_every_rank_sends_what_the_formula_says(folder: Path, number: int) -> None:
    for rank in range(4):
        found = torch.load(folder / str(number) / f"{rank}.pt")
        sent, expected = _by_group(found["sent"]), found["formula"]
        assert set(expected) <= {"data", "tensor", "pipeline", "stage"}
        for group, size in expected.items():
            assert sent[group] == pytest.approx(size, rel=1e-3, abs=2e3), (rank, group)  # norms and flags besides
