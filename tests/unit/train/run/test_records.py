"""The main rank writes what a run reports to every sink; other ranks write nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.blueprint import plan_stages
from parallel.plan.memory import MemoryModel, StepShape
from tests.distributed.problem import PALI
from train.config import RunConfig, RunSettings
from train.run.records import Records


@pytest.mark.parametrize("rank", [0, 1])
def test_an_alert_reaches_display_and_tracker_on_the_main_rank_alone(rank: int, tmp_path: Path) -> None:
    records: Any = Records(RunConfig(run=RunSettings(name="x", folder=str(tmp_path))), rank)
    shown: list[str] = []
    sent: list[tuple[str, str]] = []
    records.display = SimpleNamespace(note=shown.append)
    records.tracker = SimpleNamespace(alert=lambda title, text: sent.append((title, text)))
    records.alert("straggler", "Rank 3 is slow.")
    assert shown == ["Rank 3 is slow."] * (rank == 0)
    assert sent == [("straggler", "Rank 3 is slow.")] * (rank == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_metrics_reach_file_and_tracker_on_the_main_rank_alone(rank: int, tmp_path: Path) -> None:
    config = RunConfig(run=RunSettings(name="x", folder=str(tmp_path)))
    config.tracker.name = "none"
    records: Any = Records(config, rank)
    lines: list[dict[str, float]] = []
    assert records.begin(0, None, lambda: {}) == (rank == 0)
    records.display = SimpleNamespace(step=lambda line: None, close=lambda: None)
    records.tracker = SimpleNamespace(log=lines.append, close=lambda: None)
    records.record({"step": 1, "loss": 0.5})
    records.close()
    assert lines == [{"step": 1, "loss": 0.5}] * (rank == 0)
    assert (tmp_path / "metrics.jsonl").exists() == (rank == 0)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_run_introduces_its_model_and_the_stages_of_a_pipeline(pipeline: int, tmp_path: Path) -> None:
    parallel = ParallelConfig(pipeline=pipeline, zero_stage=1)
    memory = MemoryModel(parallel, OptimizerConfig(), StepShape.from_one_example(PALI, parallel, torch.bfloat16), 3)
    plan, stages = plan_stages(PALI, ["patches.*", "vit_block_*"], memory)
    layout = SimpleNamespace(world_size=3 * pipeline, device=torch.device("cpu"), data_parallel_size=3, config=parallel)
    records: Any = Records(RunConfig(run=RunSettings(name="x", folder=str(tmp_path))), 0)
    shown: list[str] = []
    records.display = SimpleNamespace(note=shown.append)
    records.introduce(SimpleNamespace(blueprint=SimpleNamespace(plan=plan, stages=stages), layout=layout))
    every = sum(p.numel() for p in plan.parameters()) / 1e6
    trained = sum(p.numel() for p in plan.parameters() if p.requires_grad) / 1e6
    assert shown[0] == (
        f"{every:,.1f} M parameters, {trained:,.1f} M of them trained; {3 * pipeline} processes (cpu): data 3 x "
        f"pipeline {pipeline} x tensor 1, ZeRO stage 1; bf16"
    )
    assert 0 < trained < every and len(shown) == pipeline
    if pipeline == 2:
        assert "pipeline stages" in shown[1] and stages[1].units[0] in shown[1]
