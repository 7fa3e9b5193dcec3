"""The bytes that `benchmarks.parallel` expects a rank to send are those that it counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parallel.layouts import SMALL, sent_and_expected, traffic
from benchmarks.parallel.toy import build_toy, step
from benchmarks.world import results_file, run_world

RANKS = 4
CASES: list[dict[str, Any]] = [
    {"zero_stage": 2},
    {"zero_stage": 3, "gather": "step", "reduce": "micro_batch"},
    {"pipeline": 2, "zero_stage": 3},
    {"tensor": 2, "zero_stage": 3, "sequence": True},
    {"tensor": 2, "pipeline": 2, "virtual_stages": 2},
    {"tensor": 2, "zero_stage": 2, "replicate_frozen_vit": True},
]


def count_all(folder: Path) -> None:
    for number, settings in enumerate(CASES):
        engine = build_toy(settings)
        step(engine)
        torch.save(traffic(engine), results_file(folder, f"{number} {engine.layout.rank}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("formulas")
    run_world(RANKS, count_all, found)
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(settings) for settings in CASES])
def test_every_rank_sends_what_the_formula_states(folder: Path, number: int) -> None:
    for rank in range(RANKS):
        rows = sent_and_expected(torch.load(results_file(folder, f"{number} {rank}")))
        assert rows and {group for group, *_ in rows} <= {"data", "tensor", "pipeline", "stage"}
        for *where, sent, expected in rows:
            assert sent == pytest.approx(expected, rel=1e-3, abs=SMALL), (rank, where)
