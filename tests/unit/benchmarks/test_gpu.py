"""The whole path of benchmarks.gpu with a toy; a measurement that fails or hangs ends alone."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import run_job
from model.attention.kernels import KERNELS


def test_the_toy_takes_the_whole_path(tmp_path: Path) -> None:
    sizes = ["repeats=1", "examples=4", "per_row=2", "input_tokens=8", "target_tokens=8"]
    words = ["small=true", "separate=false", *sizes]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", *words, f"output={tmp_path / 'gpu'}"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert all(each["ok"] for each in found["correctness"].values())
    checked = found["correctness"]["kernels"]["errors"]
    assert len(checked) == 3 * 2 * len(KERNELS) and max(checked.values()) > 0
    assert {name.split()[1] for name in found["correctness"]["engines"]["errors"]} == {*"0123", "fp32"}
    assert found["kernels"].keys() == KERNELS.keys()
    times = found["kernels"]["plain"]["rows"]
    assert len(times) == 3 and all(0 < each["least_ms"] <= each["median_ms"] for each in times.values())
    for name in ("toy, ours", "toy, elementwise recomputed, ours", "toy, Hugging Face"):
        step = found["steps"][name]
        assert step["losses"][-1] < step["losses"][0] and step["examples_per_s"] > 0
    trace = found["steps"]["toy, ours"]["trace"]
    assert abs(sum(trace["shares"].values()) - 1) < 1e-6 and trace["launches"] > 100
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    for title in ("## Correctness", "## T5 attention", "## Training steps", "### Kernels of one step: toy, ours"):
        assert title in text


def _fail() -> dict[str, Any]:
    raise ValueError("no such kernel")


def _hang() -> dict[str, Any]:
    time.sleep(600)
    return {}


def test_a_measurement_ends_alone() -> None:
    assert run_job(_fail, (), 60)["failed"] == "ValueError: no such kernel"
    began = time.monotonic()
    assert run_job(_hang, (), 6)["failed"] == "no result within 6 s"
    assert time.monotonic() - began < 300
    assert run_job(_hang, (), 1)["failed"] == "not run: no time was left"
